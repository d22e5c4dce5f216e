"""What a local rule is: a frozen dataclass that a method sends by name, and a client's steps in three functions."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.registry import build
from fedmerge.state import State
from fedmerge.training.correction import NO_CORRECTION, Correction
from fedmerge.training.report import TrainingReport

if TYPE_CHECKING:
    from fedmerge.training.local_training import LocalTraining

__all__ = ["RULE", "RULE_SETTINGS", "LocalRule", "rule_of"]

RULE, RULE_SETTINGS = "local-rule", "local-rule-settings"
"""Entries of a train message's configuration: the name of a rule, and its fields as JSON."""


class LocalRule(ABC):
    """What a method changes in the training of its clients.

    Subclasses are frozen dataclasses registered with :func:`fedmerge.registry.register` under their :attr:`name`. Their
    fields travel in the configuration of every train message, the method's tensors (``Aggregator.sent_with_model``)
    beside the model. What a client has to remember to its next round, :meth:`keep` returns: it stays with the client.
    """

    kind: ClassVar[str] = "local rule"
    name: ClassVar[str]
    keeps: ClassVar[bool] = False
    """Whether clients keep tensors from round to round."""
    starts_apart: ClassVar[bool] = False
    """Whether clients begin with tensors of their own that no stack of them holds: they train one by one."""

    def check(self, settings: LocalTraining) -> None:
        """Refuse settings of local training under which the rule means nothing.

        Raises
        ------
        InvalidOption
            They are such.
        """
        return

    def held(self, names: Sequence[str], round: int) -> tuple[str, ...]:
        """Which of the trained parameters of these names clients hold still in a round, and so do not send.

        Parameters
        ----------
        names
            Of parameters.
        round
            From 1.
        """
        return ()

    def correction(self, sent: State, kept: State) -> Correction:
        """What is added to a client's gradients in this round.

        Parameters
        ----------
        sent
            The method's tensors, by the names of parameters; empty as long as they are all zero.
        kept
            What the client kept of its last round; empty in its first.
        """
        return NO_CORRECTION

    def keep(self, moved: State, sent: State, kept: State, report: TrainingReport) -> dict[str, Tensor]:
        """What the client keeps, having trained.

        Parameters
        ----------
        moved
            ``theta_0 - theta`` of each parameter that it trains, in float32 or better.
        sent, kept
            As for :meth:`correction`.
        report
            What training did.
        """
        return {}

    def told(self) -> Mapping[str, str | float]:
        """Entries of a train message's configuration that name this rule."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {RULE: self.name, **({RULE_SETTINGS: json.dumps(fields, sort_keys=True)} if fields else {})}


def rule_of(config: Mapping[str, object]) -> LocalRule | None:
    """The rule that a train message's configuration names; None where it names none.

    Raises
    ------
    UnknownName
        A rule that this client does not know.
    InvalidOption
        Settings that cannot be read, or that the rule does not have.

    Examples
    --------
    >>> rule_of({"local-rule": "dynamic", "local-rule-settings": '{"alpha": 0.1}'})
    DynamicRegularizer(alpha=0.1)
    """
    name, settings = config.get(RULE), config.get(RULE_SETTINGS, "{}")
    if name is None:
        return None
    try:
        options = json.loads(str(settings))
    except ValueError as error:
        raise InvalidOption(f"local rule {name!r}: cannot read its settings {settings!r} ({error})") from error
    if not isinstance(options, dict):
        raise InvalidOption(f"local rule {name!r}: its settings {settings!r} are no table")
    rule: LocalRule = build(LocalRule.kind, str(name), options)
    return rule
