"""Where Flower's differential privacy covers a merge, and where it would only seem to."""

from __future__ import annotations

import sys
from types import FrameType

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

from fedmerge.errors import InvalidOption
from fedmerge.merging import Pipeline

__all__ = ["check_private"]

_WRAPPERS = (
    DifferentialPrivacyServerSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyClientSideAdaptiveClipping,
)
_FLOATS = ("float16", "float32", "float64")


def _wrapper() -> str | None:
    """Name of Flower's differential-privacy wrapper that is calling the strategy within it, if one is.

    A wrapper does not tell the strategy that it wraps it, and by the time that replies arrive it has clipped
    whatever they hold, statistics included: so the callers are looked at.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, _WRAPPERS):
            return type(caller).__name__
        frame = frame.f_back
    return None


def check_private(pipeline: Pipeline, arrays: ArrayRecord) -> str | None:
    """Make sure, inside a wrapper of Flower's, that clients send the model only: it clips that and adds noise to it.

    Returns
    -------
    str or None
        The wrapper's name, where there is one.

    Raises
    ------
    InvalidOption
        It is not.
    """
    wrapper = _wrapper()
    problem = None if wrapper is None else _unprotected(pipeline) or _not_clippable(arrays)
    if problem is not None:
        method = type(pipeline.aggregator).__name__
        raise InvalidOption(f"{method} cannot run inside {wrapper}: {problem}")
    return wrapper


def _unprotected(pipeline: Pipeline) -> str | None:
    aggregator, instead = pipeline.aggregator, "take one that merges models alone, such as fedavg"
    if pipeline.needs:
        names = ", ".join(pipeline.needs)
        return f"clients send {names} besides the model, which clipping and noise for the model do not cover; {instead}"
    if aggregator.several_exchanges or pipeline.refinements:
        return f"it asks clients again within a round, which the wrapper does not see; {instead}"
    if aggregator.may_change_width:
        return f"neurons that come and go are no bounded change of the model, which the noise is made for; {instead}"
    if pipeline.batch_norm == "recalibrate":
        return 'clients send batch-norm statistics in a message of their own; take batch_norm="local" or other norms'
    return None


def _not_clippable(arrays: ArrayRecord) -> str | None:
    for name, array in arrays.items():
        if array.dtype not in _FLOATS:
            return (
                f"{name!r} is {array.dtype}, and Flower clips by multiplying every tensor with a fraction; "
                "take a model without such tensors (group norm keeps no count of batches, as batch norm does)"
            )
    return None
