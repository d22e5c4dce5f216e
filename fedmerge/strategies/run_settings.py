"""What a run asks of a strategy of ours, as one object: for strategies that others have made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.layout import BatchNormPolicy, FrozenMode
from fedmerge.merging import Pipeline
from fedmerge.questions import Trust
from fedmerge.refine import Privacy
from fedmerge.statistics import StatisticsSettings
from fedmerge.strategies.policies import RoundPolicies
from fedmerge.strategies.travel import SendFrozen, Travel
from fedmerge.tasks import Task

__all__ = ["AdoptsRun", "RunSettings"]

Value = TypeVar("Value")


@dataclass(frozen=True)
class RunSettings:
    """Settings of one run, for :meth:`~fedmerge.strategies.MergeStrategy.adopt`.

    Parameters
    ----------
    seed
        Root of all that the server draws.
    policies
        What becomes of clients that fail, are late, or are too few.
    batch_norm, on_bad_update, min_clients, statistics, privacy, trust
        As for :class:`~fedmerge.strategies.MergeStrategy`.
    model_fn, example, data
        What the server knows; what a strategy has already stays.
    task
        By which models are judged on the server's data; plain classification where not given.
    personal, frozen_mode, send_frozen
        What travels, see :class:`~fedmerge.strategies.travel.Travel`.

    Examples
    --------
    >>> RunSettings(seed=3, batch_norm="pooled").agreed_seed(0)
    3
    """

    seed: int = 0
    policies: RoundPolicies = field(default_factory=RoundPolicies)
    batch_norm: BatchNormPolicy = "mean"
    on_bad_update: Literal["drop", "raise"] = "drop"
    min_clients: int = 1
    statistics: StatisticsSettings = field(default_factory=StatisticsSettings)
    privacy: Privacy = field(default_factory=Privacy)
    trust: Trust = field(default_factory=Trust)
    model_fn: Callable[[], nn.Module] | None = None
    example: Tensor | None = None
    data: Iterable[Any] | None = None
    task: Task | None = None
    personal: tuple[str, ...] = ()
    frozen_mode: FrozenMode = "eval"
    send_frozen: SendFrozen = "auto"

    def agreed_seed(self, own: int) -> int:
        """The seed of the run.

        Raises
        ------
        InvalidOption
            The strategy brings another: its runs would not be those of their seeds.
        """
        if own not in (0, self.seed):
            raise InvalidOption(f"the strategy sets seed={own}, and the run has seed {self.seed}: leave it to the run")
        return self.seed

    def agreed_policies(self, own: RoundPolicies) -> RoundPolicies:
        """The strategy's and the run's policies together.

        Raises
        ------
        InvalidOption
            They contradict each other.
        """
        usual = RoundPolicies()
        return RoundPolicies(
            _agreed("on_client_error", own.on_client_error, self.policies.on_client_error, usual.on_client_error),
            _agreed("on_too_few", own.on_too_few, self.policies.on_too_few, usual.on_too_few),
            _agreed("round_timeout", own.round_timeout, self.policies.round_timeout, usual.round_timeout),
        )

    def agreed_pipeline(self, own: Pipeline) -> Pipeline:
        """The strategy's pipeline with the run's settings in it.

        Raises
        ------
        InvalidOption
            They contradict what it sets itself, or do not go with its method.
        """
        usual = RunSettings()
        return replace(
            own,
            batch_norm=_agreed("batch_norm", own.batch_norm, self.batch_norm, usual.batch_norm),
            on_bad_update=_agreed("on_bad_update", own.on_bad_update, self.on_bad_update, usual.on_bad_update),
            min_updates=_agreed("min_clients", own.min_updates, self.min_clients, usual.min_clients),
            statistics=_agreed("statistics", own.statistics, self.statistics, usual.statistics),
            privacy=_agreed("privacy", own.privacy, self.privacy, usual.privacy),
            trust=_agreed("trust", own.trust, self.trust, usual.trust),
        )

    def agreed_travel(self, own: Travel) -> Travel:
        """What travels, by the strategy's and the run's settings together.

        Raises
        ------
        InvalidOption
            They contradict each other.
        """
        return Travel(
            own.model_fn or self.model_fn,
            _agreed("personal", own.personal, self.personal, ()),
            _agreed("frozen_mode", own.frozen_mode, self.frozen_mode, "eval"),
            _agreed("send_frozen", own.send_frozen, self.send_frozen, "auto"),
        )

    def beyond_flower(self) -> list[str]:
        """Names of settings that no strategy of Flower's own can honour, and that are not as usual."""
        usual = RunSettings()
        names = ("batch_norm", "on_bad_update", "privacy", "trust")
        return [name for name in names if getattr(self, name) != getattr(usual, name)]


@runtime_checkable
class AdoptsRun(Protocol):
    """A strategy that takes over the settings of a run, whatever it derives from."""

    def adopt(self, run: RunSettings) -> None:
        """Take over what the run asks for; raise an error of fedmerge's for what cannot be honoured."""


def _agreed(name: str, own: Value, given: Value, usual: Value) -> Value:
    """What one of two says that differs from what is usual."""
    if usual not in (own, given) and own != given:
        raise InvalidOption(f"the strategy sets {name} = {own!r}, the run {given!r}: leave one of them out")
    return own if given == usual else given
