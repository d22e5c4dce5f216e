"""Where Flower's differential privacy covers a merge, and where it would only seem to."""

from __future__ import annotations

from flwr.app import ArrayRecord

from fedmerge.errors import InvalidOption
from fedmerge.merging import Pipeline
from fedmerge.strategies.flower_frames import privacy_wrapper

__all__ = ["check_private"]

_FLOATS = ("float16", "float32", "float64")


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
    wrapper = privacy_wrapper()
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
