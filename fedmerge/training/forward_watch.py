"""A look at a model's forward pass before its clients train stacked: whether it does what only one client can.

``torch.vmap`` runs a forward pass once for all clients. What happens outside of its tensors, in attributes, hooks and
generators, then happens once instead of once for each client, and mostly without an error.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedmerge.training.dropout_masks import fork
from fedmerge.training.known_operators import unknown_reason
from fedmerge.training.model_on_data import ModelSnapshot
from fedmerge.training.padded_lookups import PaddedLookups

__all__ = ["why_not_stacked"]

# What reaches for the gradient of one client from within the forward pass.
_REACHING = {
    torch.Tensor.register_hook: "a hook on a tensor",
    torch.Tensor.retain_grad: "a gradient that is kept",
    torch.Tensor.backward: "a backward pass within the forward pass",
    torch.autograd.grad: "a gradient taken within the forward pass",
    torch.Tensor.requires_grad_: "a tensor that is made to require a gradient",
    torch.Tensor.requires_grad.__set__: "a tensor that is made to require a gradient",  # type: ignore[attr-defined]
    torch.Tensor.data.__set__: "a tensor whose data is replaced",  # type: ignore[attr-defined]
}


def why_not_stacked(model: nn.Module, x: Tensor) -> str | None:
    """The first reason not to train clients of `model` in one call; None where none is known.

    The model runs once on `x`, with gradients, and is put back to what it was.

    Parameters
    ----------
    model
        In training mode.
    x
        A batch of one client.

    Examples
    --------
    >>> tokens = torch.tensor([[0, 2]])
    >>> why_not_stacked(nn.Embedding(3, 4), tokens) is None
    True
    >>> why_not_stacked(nn.Embedding(3, 4, scale_grad_by_freq=True), tokens)
    'an embedding with scale_grad_by_freq=True, which stacked lookups forget'
    """
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            return f"parameter {name!r} has no shape yet"
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"parameter {name!r} has a hook, which sees one client's gradient"
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            return f"{type(module).__name__} {name!r} has no rule for several clients in one call"
        if module._backward_hooks or module._backward_pre_hooks:
            return f"module {name or type(module).__name__!r} has a hook on its backward pass"
    snapshot, watch, reach = ModelSnapshot(model), _Operators(), _Reaching()
    streams = _GlobalStreams()
    try:
        with fork(x.device), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), PaddedLookups(), reach, watch:
            out = model(x)
        reason = watch.reason or reach.reason or snapshot.changed() or _own_function(out)
        return reason or ("a draw from Python's or NumPy's random numbers" if streams.moved() else None)
    finally:
        snapshot.restore()
        streams.restore()


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first operator that is not known."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reason: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.reason = self.reason or unknown_reason(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Reaching(TorchFunctionMode):
    """Notes the first call that reaches for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.reason: str | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.reason = self.reason or _REACHING.get(func)
        return func(*args, **(kwargs or {}))


def _own_function(out: object) -> str | None:
    """The first ``torch.autograd.Function`` of somebody's own in a graph, where torch does not write its vmap rule."""
    for node in _nodes(out):
        cls = getattr(type(node), "_forward_cls", None)
        if cls is not None and not cls.generate_vmap_rule:
            return f"the gradient of {cls.__name__} is somebody's own, without generate_vmap_rule"
    return None


def _nodes(out: object) -> Iterator[Any]:
    waiting = deque([out.grad_fn] if isinstance(out, Tensor) and out.grad_fn is not None else [])
    seen: set[Any] = set()
    while waiting:
        node = waiting.popleft()
        if node not in seen:
            seen.add(node)
            yield node
            waiting.extend(following for following, _ in node.next_functions if following is not None)


class _GlobalStreams:
    """Python's and NumPy's global random numbers as they are: a forward pass may draw from them."""

    def __init__(self) -> None:
        self._own = random.getstate()
        self._numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002

    def moved(self) -> bool:
        """Whether something has been drawn since."""
        now: Any = np.random.get_state(legacy=False)  # noqa: NPY002
        before, after = ([*state["state"].values(), state["has_gauss"], state["gauss"]] for state in (self._numpy, now))
        return random.getstate() != self._own or not all(map(np.array_equal, before, after))

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self._own)
        np.random.set_state(self._numpy)  # noqa: NPY002
