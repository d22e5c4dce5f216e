"""What a comparison showed, in a sentence, and what to try next."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from fedmerge.plotting.runs import Run, by_method, main_measure

__all__ = ["conclude"]


def conclude(runs: Sequence[Run]) -> str:
    """Best method against FedAvg, or against the runner-up where FedAvg did not take part.

    A difference counts where every seed that both methods have says the same.

    Parameters
    ----------
    runs
        Finished runs of one comparison.
    """
    measure = main_measure(runs)
    finals = {method: _finals(group, measure) for method, group in by_method(runs).items()}
    finals = {method: accuracies for method, accuracies in finals.items() if accuracies}
    if not finals:
        return "No run was evaluated."
    if measure == "test_loss":
        return _of_losses(finals)
    ranked = sorted(finals, key=lambda method: -fmean(finals[method].values()))
    best, seeds = ranked[0], max(map(len, finals.values()))
    text = f"{best} ended at {100 * fmean(finals[best].values()):.1f} %"
    other = _opponent(best, ranked)
    if other is not None:
        text += ", " + _difference(best, other, finals)
    return f"{text}. {_advice(best, seeds, alone=other is None)}"


def _of_losses(finals: dict[str, dict[int, float]]) -> str:
    """The same of losses, of which the lowest is the best."""
    ranked = sorted(finals, key=lambda method: fmean(finals[method].values()))
    best, other = ranked[0], _opponent(ranked[0], ranked)
    text = f"{best} ended at a test loss of {fmean(finals[best].values()):.4g}"
    if other is None:
        return f"{text}. {_advice(best, len(finals[best]), alone=True)}"
    shared = sorted(set(finals[best]) & set(finals[other]))
    below = sum(finals[best][seed] < finals[other][seed] for seed in shared)
    text += f", {other} at {fmean(finals[other].values()):.4g}, below it with {below} of {len(shared)} seeds"
    return f"{text}. {_advice(best, max(map(len, finals.values())), alone=False)}"


def _finals(runs: Sequence[Run], measure: str) -> dict[int, float]:
    """The last accuracy, or loss, of each seed."""
    finals = {}
    for run in runs:
        accuracies = [row[measure] for row in run.rows if row[measure] is not None]
        if accuracies:
            finals[run.seed] = accuracies[-1]
    return finals


def _opponent(best: str, ranked: Sequence[str]) -> str | None:
    if best != "fedavg" and "fedavg" in ranked:
        return "fedavg"
    return ranked[1] if len(ranked) > 1 else None


def _difference(best: str, other: str, finals: dict[str, dict[int, float]]) -> str:
    shared = sorted(set(finals[best]) & set(finals[other]))
    if not shared:
        return f"{other} at {100 * fmean(finals[other].values()):.1f} %, on other seeds"
    apart = [100 * (finals[best][seed] - finals[other][seed]) for seed in shared]
    mean = round(fmean(apart), 1)
    points = (
        f"level with {other}" if mean == 0 else f"{abs(mean):.1f} points {'above' if mean > 0 else 'below'} {other}"
    )
    if len(shared) == 1:
        seeds = "the one seed that both have" if len(finals[best]) + len(finals[other]) > 2 else "one seed"
        return f"{points}, on {seeds}"
    agreeing = sum(difference > 0 for difference in apart)
    if agreeing == len(shared):
        return f"{points}, and above it with each of {len(shared)} seeds"
    rest = f"above it with {agreeing} of {len(shared)} seeds"
    return f"{points}, but {rest} only" if mean > 0 else f"{points}, and {rest}"


def _advice(best: str, seeds: int, *, alone: bool) -> str:
    if alone:
        return "Next: add a method with --methods; `fedmerge methods` lists them."
    if seeds < 3:
        return "Next: add seeds with --seeds 3; what is finished stays."
    return "Next: your own model with --model module:factory, other data with --dataset, more skew with --alpha 0.1."
