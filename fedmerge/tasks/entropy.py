"""How unsure a classifier is of its predictions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fedmerge.errors import InvalidOption

__all__ = ["prediction_entropy"]


def prediction_entropy(logits: Tensor, who: str) -> Tensor:
    """Entropy of each example's prediction, [examples], in nats.

    Parameters
    ----------
    logits
        [examples, classes], or one for each example, of yes and no.
    who
        Who wants to know, in front of an error.

    Raises
    ------
    InvalidOption
        The outputs have more axes: they are no logits of examples.

    Examples
    --------
    >>> import torch
    >>> prediction_entropy(torch.zeros(1, 2), "a test")
    tensor([0.6931])
    """
    if logits.ndim > 2:
        raise InvalidOption(
            f"{who}: outputs of shape {list(logits.shape)} are no logits [examples, classes]: minimise the loss "
            "instead, with labels (objective=loss)"
        )
    if logits.ndim == 1 or logits.shape[1] == 1:
        flat = logits.reshape(-1)
        return F.binary_cross_entropy_with_logits(flat, flat.sigmoid(), reduction="none")
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)
