"""Which neurons of a merge's models may be re-ordered, on what they are compared, and whether two models are one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import length_hint
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedmerge.errors import ModelError
from fedmerge.inputs import call, evenly
from fedmerge.permutations import PermutationSpec, trace
from fedmerge.permutations.holding import held
from fedmerge.state import State, is_extra

if TYPE_CHECKING:
    from fedmerge.update import MergeContext

__all__ = ["computes_alike", "sampled_inputs", "symmetries"]


def symmetries(context: MergeContext, state: State, method: str) -> PermutationSpec:
    """Which neurons of a model with the shapes of `state` may be re-ordered: none that a frozen tensor holds.

    Raises
    ------
    InvalidOption
        There is neither an example nor data to trace the model on, or no ``model_fn``.
    ModelError
        The model cannot be traced.
    """
    module = context.module(state, method)
    module.register_state_dict_post_hook(_without_extra)  # type: ignore[no-untyped-call]
    return held(trace(module, context.shown(method)), context.frozen)


def sampled_inputs(context: MergeContext, method: str, most: int) -> Iterator[Any]:
    """At most so many of the server's inputs, see :func:`~fedmerge.inputs.evenly`."""
    number = length_hint(context.data, 0) if context.data is not None else 0
    return evenly(context.inputs(method), number or None, most)


def computes_alike(context: MergeContext, first: State, second: State, method: str) -> bool:
    """Whether a model of other shapes runs on the example, and its outputs are those of the first.

    A neuron that is there and says nothing changes no sum, but it does change a norm over all of them.
    """
    example = context.shown(method)
    outputs: list[list[Tensor]] = []
    for state in (first, second):
        try:
            with torch.no_grad():
                outputs.append(_leaves(call(context.module(state, method).eval(), example)))
        except (RuntimeError, ValueError, AssertionError, ModelError):
            return False
    return all(a.shape == b.shape and _close(a, b) for a, b in zip(*outputs, strict=True))


def _without_extra(_module: nn.Module, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
    """What modules keep besides tensors has no neurons."""
    for name in [name for name in state if is_extra(name)]:
        del state[name]


def _leaves(outputs: Any) -> list[Tensor]:
    """The floating tensors in what a model returns."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    parts = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, list | tuple) else ()
    return [tensor for part in parts for tensor in _leaves(part)]


def _close(first: Tensor, other: Tensor) -> bool:
    return bool((first - other).double().abs().max() <= 1e-3 * first.double().abs().max())
