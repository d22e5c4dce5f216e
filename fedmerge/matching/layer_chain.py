"""A model as a chain of layers, and which layers of a shallow chain go with which of a deep one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmerge.errors import ModelError
from fedmerge.inputs import call

__all__ = ["Layer", "layers_of", "matched_layers", "similarity"]

_LISTS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True, eq=False)
class Layer:
    """A part of a model that is matched as a whole: a single layer with parameters, or a block out of a list of them.

    Parameters
    ----------
    name
        Of the part.
    module
        The part itself.
    form
        What another layer must share to take its place: type, names and axes of its tensors, and how far it strides.
    taken, given
        What it took in and gave out on the inputs that were shown.
    """

    name: str
    module: nn.Module
    form: tuple[Any, ...]
    taken: Tensor
    given: Tensor

    @property
    def is_norm(self) -> bool:
        """Whether it is a batch norm, which scales what the layer before says, and so stays right behind it."""
        return isinstance(self.module, nn.modules.batchnorm._BatchNorm)


def layers_of(model: nn.Module, inputs: Any) -> list[Layer]:
    """The layers of a model in the order in which they are called on some inputs.

    Raises
    ------
    ModelError
        One is called twice, or is given or gives something else than one tensor.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> [layer.name for layer in layers_of(model, torch.ones(1, 2))]
    ['0', '2']
    """
    parts, calls, hooks = dict(_parts(model, "")), [], []
    for name, part in parts.items():
        hooks.append(part.register_forward_hook(lambda _, taken, given, name=name: calls.append((name, taken, given))))
    try:
        with torch.no_grad():
            call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    layers: list[Layer] = []
    for name, taken, given in calls:
        if len(taken) != 1 or not isinstance(taken[0], Tensor) or not isinstance(given, Tensor):
            raise ModelError(
                f"layer {name!r} takes or gives more than one tensor, so that layers cannot be matched by it"
            )
        if any(layer.name == name for layer in layers):
            raise ModelError(f"layer {name!r} is called twice: its place among the layers is not one")
        layers.append(Layer(name, parts[name], _form(parts[name]), taken[0], given))
    return layers


def _parts(module: nn.Module, prefix: str, *, listed: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Layers and blocks, by name; parts without parameters are none."""
    if next(module.parameters(), None) is None:
        return
    alone = next(module.children(), None) is None
    if prefix and (alone or next(module.parameters(recurse=False), None) is not None):
        yield prefix, module  # also one that has parameters of its own besides parts, such as attention
        return
    if listed and not isinstance(module, _LISTS):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _parts(child, f"{prefix}.{name}" if prefix else name, listed=isinstance(module, _LISTS))


def _form(module: nn.Module) -> tuple[Any, ...]:
    tensors = tuple((name, tensor.ndim) for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor))
    strides = tuple(
        (n, p.stride, p.kernel_size) for n, p in module.named_modules() if isinstance(p, nn.modules.conv._ConvNd)
    )
    return type(module), tensors, strides


def matched_layers(shallow: Sequence[Layer], deep: Sequence[Layer]) -> list[int]:
    """For each layer of a shallow chain its place in a deep one: in order, first to first, last to last.

    Among those the way of least cost, by dynamic programming: ``F[k, l] = min(F[k, l-1], F[k-1, l-1] + C[k, l])``
    (Nguyen et al. 2021, arXiv:2110.15538, algorithm 1), where C is 1 minus the :func:`similarity` of what two layers
    say, and infinite where one cannot take the other's place: of another form, or on pictures of another size. A
    batch norm stays right behind the layer that it scales.

    Raises
    ------
    ModelError
        There is no such way.

    Examples
    --------
    >>> x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    >>> chain = layers_of(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)), x)
    >>> matched_layers([chain[0], chain[2]], chain)
    [0, 2]
    """
    if len(shallow) > len(deep):
        raise ModelError(f"a model of {len(shallow)} layers cannot take the form of one of {len(deep)}")
    cost: NDArray[np.float64] = np.array([[_cost(one, other) for other in deep] for one in shallow])
    cost[0, 1:] = cost[-1, :-1] = np.inf
    best = np.full((len(shallow) + 1, len(deep) + 1), np.inf)
    best[0] = 0.0
    there = best.copy()  # the same where layer k has this very place
    for k in range(1, len(shallow) + 1):
        before = there if shallow[k - 1].is_norm else best
        for place in range(k, len(deep) + 1):
            there[k, place] = before[k - 1, place - 1] + cost[k - 1, place - 1]
            best[k, place] = min(best[k, place - 1], there[k, place])
    if not np.isfinite(best[-1, -1]):
        stuck = next(k for k in range(1, len(shallow) + 1) if not np.isfinite(best[k]).any() or k == len(shallow))
        raise ModelError(
            f"layer {shallow[stuck - 1].name!r} has no place in the deeper model, whose layers are "
            f"{[layer.name for layer in deep]}: only layers of one kind, on inputs of one size, take each other's place"
        )
    places, place, tied = [], len(deep), False
    for k in range(len(shallow), 0, -1):
        while not tied and best[k, place] == best[k, place - 1]:
            place -= 1
        place, tied = place - 1, shallow[k - 1].is_norm
        places.append(place)
    return places[::-1]


def _cost(one: Layer, other: Layer) -> float:
    sizes = one.given.shape[2:] == other.given.shape[2:] if one.given.ndim == 4 else one.given.ndim == other.given.ndim
    return 1 - similarity(one.given, other.given) if one.form == other.form and sizes else float("inf")


def similarity(a: Tensor, b: Tensor) -> float:
    """Linear CKA of what two layers say of the same examples [B, ...], in [0, 1] (Kornblith et al. 2019, equation 4).

    Examples
    --------
    >>> x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    >>> round(similarity(x, 2 * x.flip(1) + 1), 6)
    1.0
    """
    first, second = (t.flatten(1).double() - t.flatten(1).double().mean(0) for t in (a, b))
    grams = first @ first.T, second @ second.T
    size = float(grams[0].norm() * grams[1].norm())
    return float((grams[0] * grams[1]).sum()) / size if size else 0.0
