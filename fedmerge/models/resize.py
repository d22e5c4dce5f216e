"""Copies of modules: as they are, those that Python cannot copy by itself too, and of the same architecture at other
widths."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedmerge.errors import ModelError
from fedmerge.state import editable, is_extra, tied_names

__all__ = ["copy_of", "fill", "refill", "resize"]


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


# Which attribute of a module states which axis of which of its tensors.
_STATED: dict[type[nn.Module], dict[str, tuple[str, int]]] = {
    nn.Linear: {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    nn.Bilinear: {"out_features": ("weight", 0), "in1_features": ("weight", 1), "in2_features": ("weight", 2)},
    nn.Embedding: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.modules.conv._ConvNd: {"out_channels": ("weight", 0)},
    nn.modules.batchnorm._NormBase: {"num_features": ("weight", 0)},
    nn.GroupNorm: {"num_channels": ("weight", 0)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
    nn.RNNBase: {"hidden_size": ("weight_hh_l0", 1), "input_size": ("weight_ih_l0", 1)},
}


def resize(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `module` that has the shapes and values of `state`.

    Parameters
    ----------
    module
        The architecture, at any width; it is not modified.
    state
        All its tensors, wider or narrower.

    Raises
    ------
    ModelError
        The names differ, or a tensor has another number of axes.

    Examples
    --------
    >>> wide = {"0.weight": torch.zeros(9, 2), "0.bias": torch.zeros(9), "1.weight": torch.zeros(1, 9),
    ...         "1.bias": torch.zeros(1)}
    >>> resize(nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 1)), wide)
    Sequential(
      (0): Linear(in_features=2, out_features=9, bias=True)
      (1): Linear(in_features=9, out_features=1, bias=True)
    )
    """
    resized = copy_of(module)
    own = resized.state_dict()
    expected, present = ({name for name in names if not is_extra(name)} for names in (own, state))
    if expected != present:
        missing, unknown = sorted(expected - present)[:3], sorted(present - expected)[:3]
        raise ModelError(f"the tensors do not fit {type(module).__name__}: missing {missing}, unknown {unknown}")
    shared: dict[int, nn.Parameter] = {}
    for prefix, part in resized.named_modules():
        start = f"{prefix}." if prefix else ""
        changed = False
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if start + name not in state or tensor.shape == state[start + name].shape:
                continue
            new = state[start + name]
            if tensor.ndim != new.ndim:
                raise ModelError(f"{start + name!r} has {new.ndim} axes, the model's has {tensor.ndim}")
            fresh = torch.empty_like(new, dtype=tensor.dtype, device=tensor.device)
            if isinstance(tensor, nn.Parameter):
                setattr(part, name, shared.setdefault(id(tensor), nn.Parameter(fresh, tensor.requires_grad)))
            else:
                setattr(part, name, fresh)
            changed = True
        if changed:
            _state(part)
    return refill(resized, state)


def refill(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load a state of the module's own shapes, in place, whatever else its ``state_dict`` holds; the module.

    Many times faster than another copy by :func:`resize`, for many states one after the other.

    Examples
    --------
    >>> refill(nn.Linear(2, 1), {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}).weight.tolist()
    [[1.0, 1.0]]
    """
    own, tied = module.state_dict(), tied_names(module)
    # Of tied names the last would win, but the first is the one that everybody calculates with.
    loaded = {name: state[tied[name]] if tied.get(name) in state else tensor for name, tensor in state.items()}
    extra = {name: value for name, value in own.items() if is_extra(name)}
    fill(module, {**{name: t.to(own[name]) for name, t in loaded.items() if not is_extra(name)}, **extra})
    return module


def fill(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Load a state that was made from the module's own, in place.

    A plain mapping of tensors does not tell which versions of its modules it is of, as a ``state_dict`` does, so the
    module's own go with it, see :func:`~fedmerge.state.editable`.

    Examples
    --------
    >>> layer = nn.Linear(2, 1)
    >>> fill(layer, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    >>> layer.weight.tolist()
    [[1.0, 1.0]]
    """
    versioned = editable(module.state_dict())
    versioned.clear()
    versioned.update(state)
    module.load_state_dict(versioned, strict=strict)


def _state(part: nn.Module) -> None:
    """Bring the attributes that state sizes in line with the tensors."""
    for kind, attributes in _STATED.items():
        if isinstance(part, kind):
            for attribute, (name, axis) in attributes.items():
                tensor = getattr(part, name, None)
                if tensor is None:
                    tensor = getattr(part, "running_mean", None)
                if tensor is not None:
                    setattr(part, attribute, tensor.shape[axis])
    if isinstance(part, nn.modules.conv._ConvNd):
        if part.groups > 1 and part.weight.shape[1] == 1:
            part.groups = part.weight.shape[0]
        part.in_channels = part.weight.shape[1] * part.groups
        if part.transposed:
            part.in_channels, part.out_channels = part.weight.shape[0], part.weight.shape[1] * part.groups
    if isinstance(part, nn.LayerNorm):
        part.normalized_shape = tuple(part.weight.shape)
    if isinstance(part, nn.RNNBase):
        part.flatten_parameters()
