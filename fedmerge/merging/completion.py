"""What follows the combination of clients: server steps, buffers, repair, refinements, averages over rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fedmerge.aggregators.aligning import Aligning
from fedmerge.edits.edit import remembered
from fedmerge.errors import InvalidOption
from fedmerge.layout import Layout
from fedmerge.merging.bounds import bounded_state, check_step
from fedmerge.merging.chain import Chain
from fedmerge.merging.intake import Intake
from fedmerge.merging.judged_model import judged, losses_of_clients
from fedmerge.merging.passed import Passed
from fedmerge.merging.repair import repair_matched
from fedmerge.merging.result import MergeResult
from fedmerge.questions import Answer, Question, bringing
from fedmerge.refine.budget import Billed
from fedmerge.refine.exchanged import Exchanged
from fedmerge.refine.guard import refine
from fedmerge.state import State, as_pairs, cast_like, from_pairs, is_norm_statistic, prefixed, with_prefix
from fedmerge.trajectories import TrajectoryContext
from fedmerge.update import MergeContext

__all__ = ["completed", "inner_context"]


def completed(
    chain: Chain,
    merged: State,
    own: State,
    intake: Intake,
    context: MergeContext,
    memory: State,
    passed: Passed | None = None,
) -> MergeResult:
    """Server steps, buffers, repair and refinements after combining; `passed` is what was combined."""
    method, reference, inner = type(chain.aggregator).__name__, intake.reference, inner_context(context, intake.layout)
    base = inner.base
    next_memory = with_prefix("aggregator", own)
    next_memory |= remembered(chain.edits, merged, inner, memory)
    for i, step in enumerate(chain.server_steps):
        if base is None:
            raise InvalidOption(f"{type(step).__name__} steps from the model all clients started from: pass base=.")
        before = base, bounded_state(merged, method)
        merged, own = step.step(*before, prefixed(f"step{i}", memory))
        check_step(merged, before, type(step).__name__)
        next_memory |= with_prefix(f"step{i}", own)
    frozen, merged = {**intake.still, **intake.unmoved.tensors}, from_pairs(merged, reference)
    merged = bounded_state(merged, method, reference)
    state = cast_like({**merged, **intake.buffers.finish(context.base), **frozen}, reference)
    _tie(state, context)
    if isinstance(chain.aggregator, Aligning) and len(intake.accepted) > 1 and chain.repair != "none":
        norms = chain.batch_norm not in ("recalibrate", "local")
        norms = norms and not any(one.measures_norms for one in chain.refinements)
        repair_matched(state, context, method, intake.rescale, norms=norms, frozen=frozen)
    exchanges: tuple[Exchanged, ...] = ()
    answers = 0
    skipped: tuple[tuple[str, str], ...] = ()
    if chain.refinements:
        models = [] if passed is None else passed.models()
        models_kept, recalled = [] if passed is None else passed.kept, prefixed("aggregator", memory)
        if chain.aggregator.falls_back and context.round > 1 and context.base is not None:
            models.append(context.base)  # no merge of clients whose training went astray is to replace it
        others = [cast_like({**state, **model, **frozen}, state) for model in models]
        billed = Billed(context.ask or _nobody)
        ask = bringing(chain.privacy.protected(billed, context.round), intake.moved or {})
        told = intake.told if context.told is None else context.told
        refined = refine(
            state,
            others,
            [one.knowing(models_kept, inner, recalled) for one in chain.refinements],
            ask,
            intake.accepted,
            chain.statistics,
            chain.privacy.noise,
            chain.bytes_left(reference),
            frozen,
            chain.believed(context),
            told,
        )
        state, exchanges, answers = refined.state, tuple(refined.exchanges), billed.questions
        skipped = tuple(refined.skipped)
        _tie(state, context)
    if chain.trajectories:
        state, kept = _judged(chain, state, intake, context, memory)
        next_memory |= kept
    return MergeResult(
        {name: state[name] for name in reference if name in state},
        next_memory,
        tuple(sorted(intake.accepted)),
        tuple(intake.dropped),
        exchanges,
        answers,
        skipped,
    )


def _judged(
    chain: Chain, state: dict[str, Tensor], intake: Intake, context: MergeContext, memory: State
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The average over rounds that this round ends with, and the memory of whoever makes it."""
    layout, told, ask = intake.layout, intake.told if context.told is None else context.told, context.ask
    norms = [name for name in layout.float_buffers if is_norm_statistic(name)]
    averaged = [name for name in (*layout.parameters, *norms) if name in state and name not in layout.still]

    def known(model: State) -> TrajectoryContext:
        asks = None if ask is None else losses_of_clients(ask, intake.accepted, model, chain.believed(context), told)
        return TrajectoryContext(context.round, context.base, asks)

    ends, kept = judged(chain.trajectories, state, averaged, known, memory)
    _tie(ends, context)
    return ends, kept


def _tie(state: dict[str, Tensor], context: MergeContext) -> None:
    """Give shared tensors their value under all their names."""
    state.update({alias: state[name] for alias, name in context.tied.items() if name in state})


def _nobody(questions: Sequence[Question], clients: Sequence[int]) -> Sequence[tuple[int, Sequence[Answer]]]:
    """Clients where none can be reached, which is checked before anything is merged."""
    return ()


def inner_context(context: MergeContext, layout: Layout) -> MergeContext:
    """The context as aggregators see it: its base has trained parameters only."""
    base = None if context.base is None else as_pairs({n: context.base[n] for n in layout.parameters})
    return replace(context, base=base, known=_known(context, layout))


def _known(context: MergeContext, layout: Layout) -> State:
    """Tensors of the base that do not travel, for every client has them."""
    return {name: context.base[name] for name in layout.still} if context.base is not None else {}
