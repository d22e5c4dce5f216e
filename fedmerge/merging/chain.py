"""The parts of a method, in the order in which they work, and what they ask of clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from fedmerge.adapters.folded_base import moved_weights
from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.aligning import Aligning
from fedmerge.edits.edit import Edit
from fedmerge.errors import InvalidOption, ModelError
from fedmerge.layout import BatchNormPolicy
from fedmerge.merging.buffers import check_policy
from fedmerge.questions import Trust
from fedmerge.refine.budget import FIRST_SHARE, model_bytes
from fedmerge.refine.privacy import Privacy
from fedmerge.refine.refinement import Refinement
from fedmerge.server_steps import ServerStep
from fedmerge.state import State, prefixed
from fedmerge.statistics import LocalSteps, Statistic, StatisticsSettings
from fedmerge.training.rules.local_rule import LocalRule
from fedmerge.trajectories import Trajectory
from fedmerge.update import MergeContext

__all__ = ["Chain"]


@dataclass(frozen=True)
class Chain:
    """An aggregator with what stands before and behind it.

    What its parts want of clients is asked of them once, and holds for all rounds.

    Parameters
    ----------
    aggregator
        Combines the clients' parameters.
    server_steps
        Taken in order after combining; each keeps its own memory.
    batch_norm
        Policy for batch-norm statistics, see :data:`~fedmerge.layout.BatchNormPolicy`. Under
        ``"recalibrate"`` the result holds their mean until whoever has data has measured them afresh.
    statistics
        How clients measure and send what the aggregator needs.
    repair
        What follows a method that re-orders neurons: ``"auto"`` measures batch norms anew on the server's data,
        where there are both; ``"rescale"`` also corrects every layer (REPAIR), which needs data.
    refinements
        Taken with further exchanges: clients send sums at the merged model, and judge what comes of them.
    privacy
        How those answers are protected, see :class:`~fedmerge.refine.privacy.Privacy`.
    trust
        How far single clients are believed in them, see :class:`~fedmerge.questions.Trust`.
    edits
        Change each client's update before it is combined, one after the other.
    trajectories
        Make an average over rounds of what comes of all this, which the round ends with.
    """

    aggregator: Aggregator
    server_steps: tuple[ServerStep, ...] = ()
    batch_norm: BatchNormPolicy = "mean"
    statistics: StatisticsSettings = field(default_factory=StatisticsSettings)
    repair: Literal["auto", "rescale", "none"] = "auto"
    refinements: tuple[Refinement, ...] = ()
    privacy: Privacy = field(default_factory=Privacy)
    trust: Trust = field(default_factory=Trust)
    edits: tuple[Edit, ...] = ()
    trajectories: tuple[Trajectory, ...] = ()

    def __post_init__(self) -> None:
        check_policy(self.batch_norm)
        if self.repair not in ("auto", "rescale", "none"):
            raise InvalidOption(f'repair must be "auto", "rescale" or "none", got {self.repair!r}')
        self.privacy.check(self.aggregator, self.refinements, self.batch_norm)
        if self.privacy != Privacy() and any(one.asks for one in self.trajectories):
            names = ", ".join(type(one).__name__ for one in self.trajectories if one.asks)
            raise InvalidOption(f"{names} has clients judge models, which privacy does not cover: leave one out")
        beside = (*self.server_steps, *self.refinements, *self.trajectories)
        if self.aggregator.moves_base and beside:
            raise InvalidOption(
                f"{type(self.aggregator).__name__} adds to frozen parameters, which {type(beside[0]).__name__} does "
                "not follow: leave it out, or take a method that merges pairs alone, such as flexlora"
            )
        if self.privacy.masks and self.trust not in (Trust(), Trust("mean", "mean")):
            raise InvalidOption(f"{self.trust} cannot look at single answers under masks: leave out one of the two")

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """Names of the statistics that clients must measure after training."""
        return tuple(statistic.name for statistic in self.measured)

    @cached_property
    def measured(self) -> tuple[Statistic, ...]:
        """The statistics themselves, as clients are to measure them."""
        return tuple(self.statistics.applied(statistic) for statistic in self.aggregator.needs)

    @cached_property
    def linearises(self) -> tuple[str, ...]:
        """Patterns of parameters in which the method has the model linearised; none where it stays as it is.

        Raises
        ------
        InvalidOption
            Two edits name others.
        """
        named = {edit.linearises for edit in self.edits} - {()}
        if len(named) > 1:
            raise InvalidOption(f"two edits linearise the model in other parameters: {sorted(named)}. Leave one out")
        return next(iter(named), ())

    @cached_property
    def compares(self) -> bool:
        """Whether clients have to keep the model that they trained until the merge is over."""
        return any(one.compares for one in self.refinements)

    @cached_property
    def sent_as(self) -> StatisticsSettings:
        """How clients send what they measure after training; a share of the method's budget, where it has one."""
        if self.aggregator.upload is None:
            return self.statistics
        return replace(self.statistics, compression="auto", budget=FIRST_SHARE * self._extra)

    @cached_property
    def local_rule(self) -> LocalRule | None:
        """What the method changes in the clients' training; None for nothing."""
        return self.aggregator.local_rule

    @property
    def _extra(self) -> float:
        """What a client may send besides its model, in models."""
        return (self.aggregator.upload or 1.0) - 1.0

    def sent_with_model(self, memory: State) -> State:
        """Tensors of the local rule that go out beside the model, of what the last merge remembered."""
        return self.aggregator.sent_with_model(prefixed("aggregator", memory))

    def moved_weights(self, memory: State) -> State:
        """What the method has added to frozen parameters, by what the last merge remembered."""
        return moved_weights(prefixed("aggregator", memory)) if self.aggregator.moves_base else {}

    def bytes_left(self, model: State) -> float | None:
        """Bytes that a client may still send for refinements; None where nothing bounds them."""
        if self.aggregator.upload is None:
            return None
        return self._extra * model_bytes(model) * (1 - FIRST_SHARE if self.needs else 1)

    def believed(self, context: MergeContext) -> Trust:
        """What clients are believed, with what is known of the losses of the task."""
        if self.trust.lowest_loss is not None or context.task is None:
            return self.trust
        return replace(self.trust, lowest_loss=context.task.lowest_loss)

    def check_complex(self, names: Sequence[str]) -> None:
        """Refuse complex parameters where something goes by what numbers do in a layer, for which pairs are no numbers.

        Parameters
        ----------
        names
            Of the complex parameters that there are.

        Raises
        ------
        ModelError
            Clients measure their layers, neurons are matched by them, or refinements move them.
        """
        needs = [name for name in self.needs if name != LocalSteps.name]
        aggregator = self.aggregator
        if not (needs or aggregator.requires_model or isinstance(aggregator, Aligning) or self.refinements):
            return
        what = needs[0] if needs else type(self.refinements[0]).__name__ if self.refinements else "matching neurons"
        raise ModelError(
            f"{type(aggregator).__name__} cannot merge complex parameters ({', '.join(map(repr, names[:3]))}), for "
            f"{what} goes by real ones: take a method that merges number by number, such as fedavg, fednova or median"
        )
