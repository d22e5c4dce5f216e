"""What a simulation is made of between two rounds, besides the global model: taken for a checkpoint, and put back."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedmerge.errors import RecordError
from fedmerge.records.checkpoints import Checkpoint
from fedmerge.simulation.grids.simulation_grid import SimulationGrid
from fedmerge.simulation.runs.plain_values import NotPlain, from_plain, to_plain
from fedmerge.state import State
from fedmerge.strategies import MergeStrategy

__all__ = ["Snapshot", "cannot_restore", "restore", "snapshot"]


class Snapshot(NamedTuple):
    """Sections and facts of a checkpoint."""

    sections: dict[str, State]
    facts: dict[str, Any]


def snapshot(strategy: Strategy, grid: Grid) -> Snapshot:
    """Take what `strategy` and the clients of `grid` remember, the engine chosen, and Python's global generator.

    The seed's own streams need no taking: each is made anew from seed, purpose and round.
    """
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"random": to_plain(random.getstate(), tensors)}
    try:
        facts["strategy"] = to_plain(_remembered(strategy), tensors)
        if isinstance(grid, SimulationGrid):
            facts["clients"] = to_plain(grid.client_states(), tensors)
            facts["engine"] = grid.workers.chosen
        elif isinstance(strategy, MergeStrategy):
            rule = strategy.pipeline.aggregator.local_rule
            if strategy.travel.personal:
                raise NotPlain("its clients keep personal parts where this process does not see them")
            if strategy.pipeline.batch_norm == "local":
                raise NotPlain("its clients keep batch norms where this process does not see them")
            if rule is not None and rule.keeps:
                raise NotPlain(f"its clients keep tensors for rule {rule.name} where this process does not see them")
    except NotPlain as error:
        facts["unsaved"] = str(error)
    return Snapshot({"simulation": tensors}, facts)


def cannot_restore(checkpoint: Checkpoint) -> str | None:
    """Why the rounds so far cannot be gone on from, if they cannot."""
    reason = checkpoint.facts.get("unsaved")
    return None if reason is None else str(reason)


def restore(checkpoint: Checkpoint, strategy: Strategy, grid: Grid) -> None:
    """Put back what :func:`snapshot` took.

    Raises
    ------
    RecordError
        It was not taken by :func:`snapshot`.
    """
    tensors, facts = checkpoint.section("simulation"), checkpoint.facts
    try:
        random.setstate(from_plain(facts["random"], tensors))
        _remind(strategy, from_plain(facts["strategy"], tensors))
        if isinstance(strategy, MergeStrategy):
            strategy.memory = dict(checkpoint.section("memory"))
        if isinstance(grid, SimulationGrid) and "clients" in facts:  # it may have been begun on another grid
            grid.set_client_states(from_plain(facts["clients"], tensors))
            grid.workers.chosen = facts["engine"]
    except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise RecordError(
            f"the checkpoint of round {checkpoint.round} holds no simulation that can be taken up ({error!r}): "
            "delete it to go on from the one before"
        ) from error


def _remembered(strategy: Strategy) -> dict[str, Any]:
    """Attributes of a strategy, and of strategies that it is wrapped around, which hold data.

    Raises
    ------
    NotPlain
        One holds an object of whose inside nothing is known, such as a generator of random numbers.
    """
    # What ours remembers stands in a section of its own; the rest of it is made anew in every round.
    ours = vars(MergeStrategy()) if isinstance(strategy, MergeStrategy) else {}
    found: dict[str, Any] = {}
    for name, value in vars(strategy).items():
        if name in ours or callable(value):
            continue
        if isinstance(value, Strategy):
            found[name] = _remembered(value)
            if isinstance(value, MergeStrategy):
                found[name]["memory"] = value.memory
            continue
        try:
            to_plain(value, {})
        except NotPlain as error:
            raise NotPlain(f"its strategy {type(strategy).__name__} keeps {error} in {name!r}") from error
        found[name] = value
    return found


def _remind(strategy: Strategy, remembered: dict[str, Any]) -> None:
    for name, value in remembered.items():
        inner = getattr(strategy, name, None)
        if isinstance(inner, Strategy):
            _remind(inner, value)
        else:
            setattr(strategy, name, value)
