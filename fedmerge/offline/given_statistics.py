"""Statistics that are passed beside models at hand: errors name them, and no client that there is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fedmerge.errors import BadArgument, BadStatistic, MissingStatistic, UnknownName
from fedmerge.registry import entries
from fedmerge.statistics import Statistic

__all__ = ["check_statistics", "named_statistics"]


def check_statistics(given: Sequence[Mapping[str, Any]] | None, needs: Sequence[Statistic], *, measured: bool) -> None:
    """Make sure that each model's statistics are those that there are, and those that the method needs.

    Parameters
    ----------
    given
        What was passed, one mapping a model.
    needs
        What the method needs.
    measured
        Whether those that are not given are measured.

    Raises
    ------
    UnknownName
        A name that no statistic has.
    BadArgument
        One that is needed is missing.
    """
    wanted = [kind.name for kind in needs]
    for i, one in enumerate(given or ()):
        # A bare number has its companions beside it: {"local_steps": 12, "momentum": 0.9}.
        bare = any(name in one and not isinstance(one[name], Mapping) for name in wanted)
        known = {*entries("statistic"), *wanted}
        for name in () if bare else one:
            if name not in known:
                raise UnknownName(f"statistic in statistics[{i}]", name, known)
        for name in () if measured else (kind.name for kind in needs if not kind.optional):
            if name not in one:
                raise BadArgument(
                    f"statistics[{i}]", i, f"the method needs {name!r}, which is missing",
                    f"Pass what compute_statistics(models[{i}], loader, [{name!r}]) returns, or clients=, one loader "
                    "per model.",
                )  # fmt: skip


@contextmanager
def named_statistics(given: Sequence[Mapping[str, Any]] | None) -> Iterator[None]:
    """Name the entry of ``statistics=`` in errors about what it holds."""
    try:
        yield
    except (BadStatistic, MissingStatistic) as error:
        number = error.client
        if given is None or not isinstance(number, int):
            raise
        remedy = f"Pass what compute_statistics(models[{number}], ...) returns for this very model."
        raise BadArgument(f"statistics[{number}]", number, error.reason, remedy) from error
