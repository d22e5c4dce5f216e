"""Tensors of which there is no mean: refused, with what to do instead."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fedmerge.checks.tensor_checks import equal_in_all
from fedmerge.errors import ModelError
from fedmerge.state import is_uninitialised

__all__ = ["check_codes", "check_mergeable", "check_pruned"]

_CODES = (torch.int8, torch.uint8)
_CODED = ("weight", "zeros", "zero_point", "codes")
"""Ends of the names of integer buffers that hold quantised weights; others count something."""


def check_mergeable(where: str, state: Mapping[str, Tensor]) -> None:
    """Make sure that all tensors of a model have values that can be calculated with.

    Raises
    ------
    ModelError
        One has none, or none that have a mean; the error begins with `where`.

    Examples
    --------
    >>> from torch import nn
    >>> check_mergeable("models[0]", nn.Linear(1, 1, device="meta").state_dict())
    Traceback (most recent call last):
        ...
    fedmerge.errors.ModelError: models[0]: 'weight' has no values (it is on the meta device): load the weights first
    """
    for name, tensor in state.items():
        reason = _reason(tensor)
        if reason:
            raise ModelError(f"{where}: {name!r} {reason}")


def _reason(tensor: Tensor) -> str:  # noqa: PLR0911 - one line a kind
    if is_uninitialised(tensor):
        return "has no shape yet, for its layer is lazy: run one batch through the model first"
    if not isinstance(tensor, Tensor):
        return f"is no tensor but {type(tensor).__name__}, as quantised modules have: merge before quantising"
    if tensor.is_meta:
        return "has no values (it is on the meta device): load the weights first"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype}), and codes have no mean: merge first, then quantise"
    if tensor.layout != torch.strided:
        return f"is sparse ({tensor.layout}): make it dense with .to_dense()"
    if tensor.is_nested:
        return "is a nested tensor, which cannot be merged: keep it as tensors of one shape"
    if is_traceable_wrapper_subclass(tensor):
        return f"is a {type(tensor).__name__}: merge plain tensors, gathered (full_tensor()) or dequantised"
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        return f"is {tensor.dtype}, which is stored codes and no arithmetic: load it in bfloat16 or float32"
    return ""


def check_codes(states: Sequence[Mapping[str, Tensor]], parameters: Collection[str]) -> None:
    """Make sure that whole numbers that count nothing are equal in all models, for then they are kept.

    A single number in a buffer counts something, as batch norm counts batches, and the largest is taken. Parameters,
    codes of quantised weights and arrays of indices or yes and no have neither a mean nor a largest.

    Raises
    ------
    ModelError
        They are not.
    """
    whole = {n for n, t in states[0].items() if not (t.is_floating_point() or t.is_complex())}
    coded = {n for n in whole if n in parameters or states[0][n].dtype in _CODES or n.endswith(_CODED)}
    suspect = coded | {n for n in whole if states[0][n].numel() > 1}
    differing = sorted(suspect - equal_in_all(states, suspect))
    if differing:
        name, dtype = differing[0], states[0][differing[0]].dtype
        if name in coded:
            raise ModelError(
                f"{name!r} is {dtype} and differs between the models: whole numbers that stand for "
                "weights, as in quantised models, have no mean. Dequantise the models, merge, and quantise the result"
            )
        raise ModelError(
            f"{name!r} is {dtype} {list(states[0][name].shape)} and differs between the models: indices and masks have "
            "no mean. Give all models the same, such as that of the model that they started from, or leave it out"
        )


def check_pruned(states: Sequence[Mapping[str, Tensor]]) -> None:
    """Make sure that models pruned by masks share them.

    Raises
    ------
    ModelError
        They do not: a mean of masks times a mean of weights is no mean of pruned weights.
    """
    masks = {n for n in states[0] if n.endswith("_mask") and f"{n.removesuffix('_mask')}_orig" in states[0]}
    differing = sorted(masks - equal_in_all(states, masks))
    if differing:
        name = differing[0].removesuffix("_mask")
        raise ModelError(
            f"{name!r} is pruned by another mask in each model: make pruning permanent before the merge, "
            "with torch.nn.utils.prune.remove(module, name)"
        )
