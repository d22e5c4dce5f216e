"""State: named tensors, and the one place that knows parameters from buffers."""

from __future__ import annotations

import cmath
import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = [
    "LARGEST",
    "Layout",
    "State",
    "WeightedSum",
    "accumulator_dtype",
    "as_rows",
    "cast_like",
    "editable",
    "is_finite",
    "is_sane",
    "module_state",
    "prefixed",
    "with_prefix",
]

State = Mapping[str, Tensor]

LARGEST = 1e15
"""Largest entry of a client's tensor: 1e8 squares of it add up in float32."""

# What batch norm calls its running statistics: all that is left of a model's buffers once a state has
# travelled as bare names, so it is the fallback where no module can be asked.
_NORM_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Layout:
    """Which tensors of a state are parameters, float buffers and integer buffers.

    Aggregators see parameters only; nobody but this class knows what ``num_batches_tracked`` is.
    """

    parameters: tuple[str, ...]
    float_buffers: tuple[str, ...]
    integer_buffers: tuple[str, ...]

    @classmethod
    def of(cls, state: State, buffers: Collection[str] | None = None) -> Layout:
        """Sort the names of `state`; `buffers` are the buffers' names, where a module is at hand to tell.

        Examples
        --------
        >>> Layout.of(nn.BatchNorm1d(2).state_dict()).integer_buffers
        ('num_batches_tracked',)
        """

        def is_number(name: str) -> bool:
            return state[name].is_floating_point() or state[name].is_complex()

        def is_buffer(name: str) -> bool:
            if buffers is not None:
                return name in buffers
            return name.rpartition(".")[2] in _NORM_STATISTICS

        return cls(
            parameters=tuple(n for n in state if is_number(n) and not is_buffer(n)),
            float_buffers=tuple(n for n in state if is_number(n) and is_buffer(n)),
            integer_buffers=tuple(n for n in state if not is_number(n)),
        )


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
    """A module's detached ``state_dict`` and the names in it that are buffers."""
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    return state, frozenset(name for name, _ in module.named_buffers() if name in state)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity, in one pass where it has not."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # A finite sum proves all entries finite; only one that is not needs a closer look, for it may overflow.
    return cmath.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def is_sane(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN, and nothing so large that sums of squares, or of many clients, overflow."""
    if tensor.is_complex():
        return is_sane(torch.view_as_real(tensor))
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return float(low) >= -LARGEST and float(high) <= LARGEST


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
