"""Errors of torch, NumPy and Python that no check foresaw, told in the words of what was tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedmerge.errors import FedMergeError, ModelError

__all__ = ["RAW", "named"]

RAW = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def named(what: str) -> Iterator[None]:
    """Say what failed where something raises what is no error of ours; memory that is used up stays what it is.

    Raises
    ------
    ModelError
        Something did; the error that it was is the cause.

    Examples
    --------
    >>> with named("merge by fedavg"):
    ...     raise RuntimeError("no such kernel")
    Traceback (most recent call last):
        ...
    fedmerge.errors.ModelError: merge by fedavg failed: RuntimeError: no such kernel. See that model(inputs) runs.
    """
    try:
        yield
    except (FedMergeError, torch.OutOfMemoryError):
        raise
    except RAW as error:
        first = (str(error).strip() or "no reason given").split("\n")[0]
        raise ModelError(
            f"{what} failed: {type(error).__name__}: {first.rstrip('.')}. See that model(inputs) runs."
        ) from error
