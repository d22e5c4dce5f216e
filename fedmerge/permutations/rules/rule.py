"""What a rule is: from the values that go into one operator to the values that come out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from fedmerge.permutations.labels import Labels
from fedmerge.permutations.values import Value

__all__ = ["RULES", "Call", "Outcome", "Rule", "rule", "tensors_in"]

Outcome: TypeAlias = "Value | tuple[Value, ...]"


@dataclass(frozen=True)
class Call:
    """One operator of a traced graph, its tensors replaced by what is known of them.

    Parameters
    ----------
    labels
        Where to put what the operator tells.
    operator
        ATen name, such as ``"linear"``.
    target
        The operator itself.
    arguments
        All arguments by the names of the operator's schema, defaults filled in.
    shapes
        Of the outputs, one each.
    single
        Whether it returns a tensor and not a tuple of them.
    """

    labels: Labels
    operator: str
    target: Any
    arguments: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    single: bool

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first output."""
        return self.shapes[0]

    @property
    def tensors(self) -> list[Value]:
        """All tensors among the arguments, in order."""
        return list(tensors_in(list(self.arguments.values())))


def tensors_in(argument: Any) -> Iterator[Value]:
    """The values in a nest of lists."""
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from tensors_in(part)


Rule = Callable[[Call], Outcome]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule under the ATen names of the operators that it is for."""

    def keep(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return keep
