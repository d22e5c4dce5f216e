"""State: named tensors, and what can be told of them by looking at them."""

from __future__ import annotations

import cmath
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = [
    "LARGEST",
    "State",
    "WeightedSum",
    "accumulator_dtype",
    "as_pairs",
    "as_rows",
    "cast_like",
    "editable",
    "extent",
    "from_pairs",
    "frozen_names",
    "is_extra",
    "is_finite",
    "is_mask",
    "is_norm_statistic",
    "is_number",
    "is_sane",
    "is_uninitialised",
    "module_state",
    "prefixed",
    "tied_names",
    "trained_names",
    "with_prefix",
]

State = Mapping[str, Tensor]

LARGEST = 1e15
"""Largest entry of a client's tensor: 1e8 squares of it add up in float32."""

# What batch norm calls its running statistics: nearly all that is left of a model's buffers once a state has
# travelled as bare names, so it is the fallback where no module can be asked.
_NORM_STATISTICS = ("running_mean", "running_var")


def editable(state: State) -> dict[str, Tensor]:
    """A shallow copy that may be changed; that of a ``state_dict`` keeps the versions of its modules.

    Modules that changed between versions, such as torchvision's MNASNet, read from a ``state_dict`` which version it
    is of, and refuse one that does not tell.

    Examples
    --------
    >>> changed = editable(nn.BatchNorm1d(2).state_dict())
    >>> changed["weight"] = torch.zeros(2)
    >>> changed._metadata[""]["version"]
    2
    """
    return copy.copy(state) if isinstance(state, dict) else dict(state)


def module_state(module: nn.Module) -> tuple[dict[str, Tensor], frozenset[str]]:
    """A module's detached ``state_dict``, but for extra state of modules, and the names in it that are buffers."""
    state = {
        name: tensor.detach() if isinstance(tensor, Tensor) and not is_uninitialised(tensor) else tensor
        for name, tensor in module.state_dict().items()
        if not is_extra(name)
    }
    return state, frozenset(name for name, _ in module.named_buffers() if name in state)


def trained_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that a module trains, tied names included: all where it trains none.

    A model that is frozen as a whole has only been made ready for use: it says nothing of how it was trained.

    Examples
    --------
    >>> model = nn.Linear(2, 1)
    >>> _ = model.weight.requires_grad_(False)
    >>> sorted(trained_names(model))
    ['bias']
    """
    named = [(n, p) for n, p in module.named_parameters(remove_duplicate=False) if is_number(p)]
    trained = frozenset(name for name, parameter in named if parameter.requires_grad)
    return trained or frozenset(name for name, _ in named)


def frozen_names(module: nn.Module) -> frozenset[str]:
    """Names of a module's parameters that are not trained (``requires_grad=False``)."""
    trained = trained_names(module)
    return frozenset(name for name, _ in module.named_parameters(remove_duplicate=False) if name not in trained)


def tied_names(module: nn.Module) -> dict[str, str]:
    """The first name of each parameter that has several, by its further names.

    Examples
    --------
    >>> a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    >>> b.weight = a.weight
    >>> tied_names(nn.Sequential(a, b))
    {'1.weight': '0.weight'}
    """
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: known for name, p in named if (known := first.setdefault(id(p), name)) != name}


def is_extra(name: str) -> bool:
    """Whether an entry of a ``state_dict`` is what a module keeps besides tensors (``get_extra_state``)."""
    return name.rpartition(".")[2] == "_extra_state"


def is_uninitialised(tensor: Tensor) -> bool:
    """Whether a tensor of a lazy layer has no shape yet."""
    return bool(nn.parameter.is_lazy(tensor))


def is_norm_statistic(name: str) -> bool:
    """Whether a tensor of this name is a running statistic of batch norm, which training may spoil."""
    return name.rpartition(".")[2] in _NORM_STATISTICS


def is_number(tensor: Tensor) -> bool:
    """Whether a tensor holds floating or complex numbers, which can be trained."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_mask(tensor: Tensor) -> bool:
    """Whether a tensor holds what no model is trained to, such as -inf, and yet no NaN: a mask of attention."""
    return not is_sane(tensor) and not bool(tensor.isnan().any())


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity, in one pass where it has not."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # A finite sum proves all entries finite; only one that is not needs a closer look, for it may overflow.
    return cmath.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def is_sane(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN, and nothing so large that sums of squares, or of many clients, overflow."""
    return extent(tensor) <= LARGEST


def extent(tensor: Tensor) -> float:
    """The largest magnitude among a tensor's floating numbers, 0 where it has none, NaN where one is NaN.

    Examples
    --------
    >>> extent(torch.tensor([-3.0, 2.0])), extent(torch.tensor([3 - 4j])), extent(torch.tensor([7]))
    (3.0, 4.0, 0.0)
    """
    if tensor.is_complex():
        return extent(torch.view_as_real(tensor.resolve_conj()))
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high))


def as_rows(stacked: Tensor) -> Tensor:
    """Tensors of K clients [K, ...] as K rows, be they single numbers or empty.

    Examples
    --------
    >>> as_rows(torch.zeros(3)).shape, as_rows(torch.zeros(3, 0, 2)).shape
    (torch.Size([3, 1]), torch.Size([3, 0]))
    """
    return stacked.reshape(len(stacked), stacked.shape[1:].numel())


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to sum `dtype` in: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def cast_like(state: State, like: State) -> dict[str, Tensor]:
    """`state` with the dtype and device of `like`, tensor by tensor."""
    return {name: tensor.to(like[name]) for name, tensor in state.items()}


def with_prefix(prefix: str, state: State) -> dict[str, Tensor]:
    """`state` with every name moved below `prefix`."""
    return {f"{prefix}/{name}": tensor for name, tensor in state.items()}


def prefixed(prefix: str, state: State) -> dict[str, Tensor]:
    """The part of `state` below `prefix`, names as they were before :func:`with_prefix`."""
    start = f"{prefix}/"
    return {name[len(start) :]: tensor for name, tensor in state.items() if name.startswith(start)}


@dataclass
class WeightedSum:
    """A running ``sum_i w_i theta_i`` and ``sum_i w_i``: one model of memory however many are added."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    weight: float = 0.0

    def add(self, state: State, weight: float) -> None:
        """Add ``weight * state``."""
        for name, tensor in state.items():
            self._include(name, tensor.to(accumulator_dtype(tensor.dtype)) * weight)
        self.weight += weight

    def add_stacked(self, states: State, weights: Sequence[float]) -> None:
        """Add ``sum_k weights[k] * states[k]`` of tensors [K, ...], to the bit what K calls of :meth:`add` give."""
        for name, stacked in states.items():
            dtype = accumulator_dtype(stacked.dtype)
            factors = torch.tensor(weights, dtype=dtype, device=stacked.device)
            for term in (stacked.to(dtype) * factors.view(-1, *[1] * (stacked.ndim - 1))).unbind():
                self._include(name, term)
        for weight in weights:
            self.weight += weight

    def _include(self, name: str, term: Tensor) -> None:
        """Add a product that was rounded by itself.

        Fused into one operation, product and sum round once: on some processors, in some places of a tensor, and not
        in a matrix product over all clients. Apart, they give the same bits on every path.
        """
        total = self.tensors.get(name)
        if total is None:
            self.tensors[name] = term.clone() if term._base is not None else term  # a view would hold all clients
        else:
            total.add_(term)

    def join(self, other: WeightedSum) -> None:
        """Add another running sum; `other` must not be used again."""
        for name, tensor in other.tensors.items():
            total = self.tensors.get(name)
            if total is None:
                self.tensors[name] = tensor
            else:
                total.add_(tensor)
        self.weight += other.weight

    def mean(self) -> dict[str, Tensor]:
        """``sum_i w_i theta_i / sum_i w_i``; uses the sums up, so call it once."""
        return {name: total.div_(self.weight) for name, total in self.tensors.items()}


def as_pairs(state: State) -> dict[str, Tensor]:
    """The state with complex tensors [...] as real ones [..., 2]; others as they are.

    Examples
    --------
    >>> as_pairs({"w": torch.tensor([1 + 2j])})["w"]
    tensor([[1., 2.]])
    """
    return {name: torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for name, t in state.items()}


def from_pairs(state: State, like: State) -> dict[str, Tensor]:
    """The reverse of :func:`as_pairs`, for those tensors that are complex in `like`.

    Examples
    --------
    >>> from_pairs({"w": torch.tensor([[1.0, 2.0]])}, {"w": torch.tensor([0j])})["w"]
    tensor([1.+2.j])
    """
    return {
        name: torch.view_as_complex(t.contiguous()) if like[name].is_complex() and not t.is_complex() else t
        for name, t in state.items()
    }
