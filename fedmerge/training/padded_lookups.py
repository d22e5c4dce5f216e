"""Embeddings with a row of padding, for several clients in one call.

Batched, ``embedding`` knows the row of padding of the first client only, and trains those of the others. Here the rows
are looked up without it, and what comes of padding is cut from the graph, which is all that ``padding_idx`` means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["PaddedLookups"]

_ARGUMENTS = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


class PaddedLookups(TorchFunctionMode):
    """Takes the place of ``torch.nn.functional.embedding`` where it is given a row of padding.

    Examples
    --------
    >>> weight = torch.ones(3, 2, requires_grad=True)
    >>> with PaddedLookups():
    ...     F.embedding(torch.tensor([0, 1, 1]), weight, padding_idx=-3).sum().backward()
    >>> weight.grad.tolist()
    [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.embedding:
            return func(*args, **kwargs)
        arguments = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        padding = arguments.pop("padding_idx", None)
        if padding is None:
            return func(*args, **kwargs)
        looked_up: Tensor = func(**arguments)
        rows = arguments["weight"].shape[0]
        is_padding = (arguments["input"] == (padding + rows if padding < 0 else padding)).unsqueeze(-1)
        return torch.where(is_padding, looked_up.detach(), looked_up)
