"""Models made as deep as another by layers that change nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.errors import ModelError
from fedmerge.inputs import call, changed, tensors_of
from fedmerge.matching.layer_chain import Layer, layers_of, matched_layers
from fedmerge.models.resize import copy_of, resize
from fedmerge.state import module_state

__all__ = ["as_deep", "deepened", "shown_inputs"]

_ROWS = 32
_CLOSE = 1e-4


def as_deep(models: Sequence[nn.Module], inputs: Any) -> list[nn.Module]:
    """All models in the form of the deepest, each computing what it computed; those that have it are left as they are.

    Raises
    ------
    ModelError
        See :func:`deepened`.
    """
    if len({tuple(model.state_dict()) for model in models}) == 1:
        return list(models)
    deepest = max(models, key=lambda model: len(layers_of(_in_use(model), inputs)))
    return [deepened(model, deepest, inputs) for model in models]


def deepened(model: nn.Module, like: nn.Module, inputs: Any) -> nn.Module:
    """A model of the form of another, deeper one, which computes what `model` does, at the widths of `model`.

    Its layers are matched with those of the other, see :func:`~fedmerge.matching.layer_chain.matched_layers`; where a
    gap is, a layer goes in that gives what it takes (Nguyen et al. 2021, section 3.2): the identity for linear layers,
    a kernel of one in its centre for convolutions, batch norms that undo themselves, and residual blocks whose branch
    is zero. Behind a layer that goes in, the activation must change nothing twice, as ReLU does. What it computes is
    that in use: a batch norm that goes in measures its own statistics once it trains.

    Parameters
    ----------
    model, like
        Neither is changed.
    inputs
        What both are called with, some examples: layers are matched by what they say of them.

    Raises
    ------
    ModelError
        A layer has no place in the other model, or one would have to go in that cannot be without effect.

    Examples
    --------
    >>> from fedmerge.models import build_model
    >>> shallow, deep = (build_model("mlp", (4,), 3, hidden=h, seed=0) for h in ([5], [7, 7, 7]))
    >>> x = torch.randn(8, 4)
    >>> deeper = deepened(shallow, deep, x)
    >>> [tuple(layer.weight.shape) for layer in deeper.layers], bool(torch.allclose(deeper(x), shallow(x)))
    ([(5, 4), (5, 5), (5, 5), (3, 5)], True)
    """
    own = module_state(model)[0]
    if list(own) == list(like.state_dict()):
        return model
    shallow, deep = layers_of(_in_use(model), inputs), layers_of(_in_use(like), inputs)
    places = matched_layers(shallow, deep)
    within = tuple(f"{layer.name}." for layer in shallow)
    state = {name: tensor for name, tensor in own.items() if not name.startswith(within)}
    inserted = []
    before = shallow[0]
    for place, layer in enumerate(deep):
        if place in places:
            before = shallow[places.index(place)]
            tensors = module_state(before.module)[0]
        else:
            tensors = _without_effect(layer, before)
            inserted.append(layer.name)
        state |= {f"{layer.name}.{name}": tensor for name, tensor in tensors.items()}
    missing = sorted(set(like.state_dict()) ^ set(state))
    if missing:
        raise ModelError(f"{missing[0]!r} is in one of two models of unequal depth, and belongs to no layer of a chain")
    deeper = resize(like, state)
    for name, parameter in deeper.named_parameters():
        parameter.requires_grad_(dict(like.named_parameters())[name].requires_grad)
    _check_same(model, deeper, inputs, inserted)
    return deeper.train(model.training)


def shown_inputs(example: Any, seed: int = 0) -> Any:
    """Inputs of an example's form by which layers can be told: standard normal numbers, where it holds numbers.

    Examples
    --------
    >>> shown_inputs(torch.zeros(2, 3)).shape
    torch.Size([32, 3])
    """
    draws, examples = torch.Generator().manual_seed(seed), next((len(t) for t in tensors_of(example) if t.ndim), 1)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.ndim or len(tensor) != examples:
            return tensor
        return torch.randn(_ROWS, *tensor.shape[1:], generator=draws).to(tensor)

    every = all(t.is_floating_point() for t in tensors_of(example))  # tokens tell layers themselves
    return changed(example, drawn) if every else example


def _in_use(model: nn.Module) -> nn.Module:
    return copy_of(model).eval()


def _without_effect(layer: Layer, before: Layer) -> dict[str, Tensor]:
    """Tensors with which a layer gives what it takes, behind what gives this.

    Raises
    ------
    ModelError
        There are none.
    """
    shown = before.given.relu()  # whatever follows the layer before: only what stays under ReLU can go through
    own, width = module_state(layer.module)[0], shown.shape[_axis(shown)]
    wide = layer.taken.shape[_axis(layer.taken)]
    alone = next(layer.module.children(), None) is None
    shapes = {
        name: _square(t, width) if alone else [width if size == wide else size for size in t.shape]
        for name, t in own.items()
    }
    for tensors in _candidates(layer.module, own, shapes):
        try:
            part = resize(layer.module, {name: t.to(own[name]) for name, t in tensors.items()}).eval()
            with torch.no_grad():
                given = part(shown)
        except (RuntimeError, ValueError):
            continue
        if given.shape == shown.shape and _close(given, shown):
            return {name: t.to(own[name]) for name, t in tensors.items()}
    raise ModelError(
        f"layer {layer.name!r}, a {type(layer.module).__name__}, would go into a shallower model without effect, and "
        "no values of its tensors do that: give the models layers of one depth there, or leave the shallower ones out"
    )


def _axis(tensor: Tensor) -> int:
    return 1 if tensor.ndim in (2, 4) else -1


def _candidates(module: nn.Module, own: dict[str, Tensor], shapes: dict[str, list[int]]) -> Iterator[dict[str, Tensor]]:
    """Tensors that may do: the identity of a single layer; of a block its own with the last part zero, or all zero."""
    still = {name: _unit(name, torch.zeros(shape)) for name, shape in shapes.items()}
    if next(module.children(), None) is None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield still | {"weight": torch.full(shapes["weight"], (1 + module.eps) ** 0.5)} if module.affine else still
        elif "weight" in shapes and len(shapes["weight"]) >= 2:
            yield still | {"weight": _identity(shapes["weight"])}
        return
    last = next((name.rpartition(".")[0] for name in reversed(shapes) if "num_batches" not in name), "")
    inner = {n: t if list(t.shape) == shapes[n] else still[n] for n, t in own.items() if not n.startswith(f"{last}.")}
    yield {name: inner.get(name, still[name]) for name in shapes}
    yield still


def _square(tensor: Tensor, width: int) -> list[int]:
    """The shape of a single layer's tensor where it gives as much as it takes."""
    within = 1 if tensor.ndim > 2 and tensor.shape[1] == 1 else width  # each channel by itself
    return [width if axis == 0 else within if axis == 1 else size for axis, size in enumerate(tensor.shape)]


def _unit(name: str, zeros: Tensor) -> Tensor:
    return zeros + 1 if name.rpartition(".")[2] == "running_var" else zeros


def _identity(shape: list[int]) -> Tensor:
    """Ones where an output is its own input: the centre of a kernel."""
    weight = torch.zeros(shape)
    centre = tuple(size // 2 for size in shape[2:])
    for i in range(shape[0]):
        weight[(i, i if shape[1] > 1 else 0, *centre)] = 1
    return weight


def _check_same(model: nn.Module, deeper: nn.Module, inputs: Any, inserted: Sequence[str]) -> None:
    with torch.no_grad():
        pairs = zip(*(tensors_of(call(_in_use(one), inputs)) for one in (model, deeper)), strict=True)
        if all(_close(a, b) for a, b in pairs):
            return
    raise ModelError(
        f"{type(model).__name__} cannot be made deeper: with the layers {list(inserted)} put in without effect it "
        "computes something else, as where an activation behind them changes what it gave before (only ReLU and "
        "its like do not). Give the models layers of one depth there"
    )


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= _CLOSE * max(1.0, float(b.abs().max())))
