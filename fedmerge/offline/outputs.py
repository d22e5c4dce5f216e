"""Models that give more than one tensor: which of them the loss is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.errors import ModelError
from fedmerge.models.resize import copy_of

__all__ = ["main_output", "with_one_output"]

_NAMES = ("logits", "out", "output", "outputs", "prediction", "predictions", "scores")


def main_output(outputs: Any) -> Tensor:
    """The tensor that a model's loss is of: the first of a tuple, ``logits`` or ``out`` of a mapping.

    Raises
    ------
    ModelError
        Nobody can tell which it is.

    Examples
    --------
    >>> main_output((torch.zeros(2, 3), None)).shape
    torch.Size([2, 3])
    """
    if isinstance(outputs, Mapping):
        tensors = {name: value for name, value in outputs.items() if isinstance(value, Tensor) and value.ndim}
        named = [name for name in _NAMES if name in tensors] or list(tensors)
        if len(tensors) == 1 or (named[:1] and named[0] in _NAMES):
            return tensors[named[0]]
        shown = ", ".join(map(str, list(outputs)[:5])) or "nothing"
        raise ModelError(
            f"the model gives a mapping ({shown}), and nothing says which of it is the prediction: wrap the model in a "
            "module whose forward returns that tensor, or call it 'logits'"
        )
    if isinstance(outputs, tuple | list) and outputs:
        return main_output(outputs[0])
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"the model gives {type(outputs).__name__}, no tensor: wrap it in a module whose forward returns its logits"
        )
    return outputs


def with_one_output(model: nn.Module, inputs: Any) -> nn.Module:
    """The model, or a copy of it that gives :func:`main_output`, where on `inputs` it gives anything but a tensor.

    Raises
    ------
    ModelError
        It does not run on these inputs, or gives no tensor that can be told to be its prediction.
    """
    copied = copy_of(model).eval()
    try:
        with torch.no_grad():
            outputs = copied(inputs)
    except Exception as error:  # a forward may raise anything
        shape = f" of shape {list(inputs.shape)} and {inputs.dtype}" if isinstance(inputs, Tensor) else ""
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{type(model).__name__} does not run on a batch of inputs{shape}: {type(error).__name__}: {first}. "
            "Give the batches that model(inputs) takes"
        ) from error
    if isinstance(outputs, Tensor):
        return model
    main_output(outputs)
    copied.train(model.training)
    copied.register_forward_hook(_only)
    return copied


def _only(_module: nn.Module, _inputs: Any, outputs: Any) -> Tensor:
    return main_output(outputs)
