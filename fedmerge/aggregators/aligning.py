"""What methods share that bring the clients' neurons into one order and average, or else combine, them then."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import ClassVar

from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator, ServerData
from fedmerge.errors import BadUpdate, InvalidOption
from fedmerge.lookup.method_names import parse_method
from fedmerge.matching.symmetries import symmetries
from fedmerge.permutations import PermutationSpec
from fedmerge.registry import build
from fedmerge.state import State
from fedmerge.statistics import Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Aligning", "Permuting"]


@dataclass(frozen=True)
class Aligning(Aggregator):
    """Brings models into one order of neurons, then averages them by their weights, or combines them otherwise.

    Running statistics follow the neurons, so :meth:`align` sees them; how they are merged is the pipeline's
    policy, applied to what :meth:`align` gives.

    Parameters
    ----------
    combine
        What merges the aligned models: an aggregator that needs nothing but them, options in parentheses, such as
        ``"median"`` or ``"trimmed_mean(trim=0.3)"``.
    """

    requires_model: ClassVar[bool] = True
    carries_statistics: ClassVar[bool] = False
    """Whether what clients measured is re-ordered with their neurons."""

    combine: str = field(default="fedavg", kw_only=True)

    def __post_init__(self) -> None:
        combiner, name = self.combiner, f"{type(self).__name__}: combine = {self.combine!r}"
        if isinstance(combiner, Aligning):
            raise InvalidOption(f"{name} aligns once more: name a method that merges what is aligned, such as median")
        if combiner.needs and not self.carries_statistics:
            raise InvalidOption(f"{name} needs statistics, which do not follow the neurons: name one that needs none")
        if combiner.requires_base:
            raise InvalidOption(f"{name} looks at updates, but the base is not aligned: name one that needs no base")

    @cached_property
    def combiner(self) -> Aggregator:
        """The aggregator that `combine` names."""
        name, *steps = parse_method(self.combine)
        if steps:
            raise InvalidOption(f"combine = {self.combine!r}: server steps stand behind the whole method, not in it")
        made: Aggregator = build("aggregator", name.name, name.options)
        return made

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """What the combination needs."""
        return self.combiner.needs

    @property
    def server_data(self) -> ServerData:
        """What the alignment needs, or the combination."""
        combined, own = self.combiner.server_data, super().server_data
        return combined if own == "none" else "labels" if combined == "labels" else own

    @abstractmethod
    def align(self, updates: Sequence[ClientUpdate], context: MergeContext) -> Iterator[ClientUpdate | BadUpdate]:
        """Updates that may be averaged tensor by tensor, one at a time, or why one may not.

        Raises
        ------
        CannotMatch
            Before the first of them: some clients have to be left out for the others to be matched.
        """

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Combine what :meth:`align` gave."""
        return self.combiner.merge(updates, context, memory)


class Permuting(Aligning):
    """Alignment by permutations, which leave every client's function as it is."""

    carries_statistics: ClassVar[bool] = True

    @abstractmethod
    def permutations(
        self, spec: PermutationSpec, updates: Sequence[ClientUpdate], context: MergeContext
    ) -> list[list[Tensor]]:
        """For each client, a permutation of each group."""

    def align(self, updates: Sequence[ClientUpdate], context: MergeContext) -> Iterator[ClientUpdate]:
        """Re-order each client's neurons."""
        if len(updates) == 1:
            yield from updates
            return
        spec = symmetries(context, updates[0].state, type(self).__name__)
        permutations = self.permutations(spec, updates, context)
        carried = {kind.name: kind for kind in self.needs}
        for update, perms in zip(updates, permutations, strict=True):
            move = partial(spec.apply, perms=perms)
            statistics = {
                name: carried[name].reordered(value, update.state, move) if name in carried else value
                for name, value in update.statistics.items()
            }
            yield replace(update, state=spec.apply(update.state, perms), statistics=statistics)
