"""Copies of modules, those that Python cannot copy by itself too."""

from __future__ import annotations

import copy

from torch import Tensor, nn

__all__ = ["copy_of"]


def copy_of(module: nn.Module) -> nn.Module:
    """A deep copy of a module.

    Pruning, weight norm and spectral norm of ``torch.nn.utils`` keep the weight that they computed last at the module,
    with its graph, which cannot be copied. The copy has its values alone: the next forward pass computes it anew.

    Examples
    --------
    >>> from torch.nn.utils import prune
    >>> layer = prune.l1_unstructured(nn.Linear(2, 2), "weight", 1)
    >>> [name for name, _ in copy_of(layer).named_parameters()]
    ['bias', 'weight_orig']
    """
    computed = {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    return copy.deepcopy(module, computed)
