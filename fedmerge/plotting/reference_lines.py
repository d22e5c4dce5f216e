"""Reference lines of a comparison: what the clients' own models reach, read from the run records."""

from __future__ import annotations

from collections.abc import Sequence

from fedmerge.plain_text import one_line
from fedmerge.plotting.runs import Run

__all__ = ["references"]


def references(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Accuracies (losses in tasks without any) by name of reference, one per seed that has them.

    All methods of a seed start from the same model, so their clients' models of the first round, which
    references speak of, are the same: the first method's record counts.
    """
    by_name: dict[str, dict[int, float]] = {}
    for run in runs:
        for row in run.rows:
            for name, accuracy in (row.get("references") or {}).items():
                by_name.setdefault(one_line(name, 40), {}).setdefault(run.seed, float(accuracy))
    return {name: list(by_seed.values()) for name, by_seed in by_name.items()}
