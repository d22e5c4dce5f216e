"""What clients told in an exchange, averaged as Flower does: for strategies that do not tell themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flwr.app import Message
from flwr.serverapp.strategy import FedAvg

from fedmerge.strategies.client_metrics import judged

__all__ = ["mean_metrics"]

_WEIGHT = "num-examples"


def mean_metrics(replies: Iterable[Message]) -> Mapping[str, float]:
    """The clients' numbers by name, weighted by their examples; those that cannot be averaged are left out.

    Parameters
    ----------
    replies
        To a message of training or of evaluation, errors among them.
    """
    contents = [message.content for message in judged(replies, _WEIGHT)]
    if not contents:
        return {}
    told = FedAvg().train_metrics_aggr_fn(contents, _WEIGHT)
    return {name: float(value) for name, value in told.items() if isinstance(value, int | float)}
