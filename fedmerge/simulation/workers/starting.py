"""Starts the workers that a person asks for: this process, or Ray actors."""

from __future__ import annotations

from typing import Literal

from fedmerge.errors import ConfigError, WorkersUnavailable
from fedmerge.simulation.workers.causes import in_words
from fedmerge.simulation.workers.cohort_work import Engine
from fedmerge.simulation.workers.workers import InProcess, Workers

__all__ = ["make_workers", "parse_workers"]

_NO_RAY = "install it again, or train in this process with --workers 1"


def parse_workers(workers: int | str) -> int | Literal["auto", "ray"]:
    """Understand what a person wrote for workers.

    Raises
    ------
    ConfigError
        Neither a positive number nor ``auto`` or ``ray``.

    Examples
    --------
    >>> parse_workers("2")
    2
    """
    if workers == "auto":
        return "auto"
    if workers == "ray":
        return "ray"
    try:
        number = int(workers)
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"workers must be a number of at least 1, auto or ray; got {workers!r}")
    return number


def make_workers(workers: int | str, engine: Engine = "auto", client_timeout: float | None = None) -> Workers:
    """Start the workers that were asked for; see :class:`SimulationGrid`."""
    wanted = parse_workers(workers)
    if wanted in ("auto", 1):
        return InProcess(engine)
    try:
        from fedmerge.simulation.workers.ray_workers import RayWorkers  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "ray":
            raise ConfigError('workers on Ray need ray: pip install "fedmerge[sim]"') from error
        raise WorkersUnavailable(f"Ray cannot be imported: {in_words(error)}: {_NO_RAY}") from error
    except (OSError, RuntimeError, SyntaxError, AttributeError, TypeError, ValueError) as error:  # it is damaged
        raise WorkersUnavailable(f"Ray cannot be imported: {in_words(error)}: {_NO_RAY}") from error
    return RayWorkers(wanted if isinstance(wanted, int) else None, engine=engine, client_timeout=client_timeout)
