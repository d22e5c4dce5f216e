"""Scales and shifts of norms folded into the linear layers behind them, so that what comes before may be turned."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.permutations.export import exported
from fedmerge.state import State, accumulator_dtype

__all__ = ["Fold", "folded", "norms_of"]

_PASSING = frozenset(
    {
        "transpose", "permute", "view", "_unsafe_view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze",
        "slice", "select", "clone", "contiguous", "alias", "expand", "dropout", "detach", "detach_", "mean", "to",
        "_to_copy",
    }
)  # fmt: skip
"""Operators that commute with a scale and a shift of the last axis; wrong where they touch that axis, which a trial
shows."""


@dataclass(frozen=True)
class Fold:
    """A norm's scale and shift, and what comes behind it.

    Parameters
    ----------
    scale, shift
        Names of parameters; a norm may have no shift.
    weights
        Names of the matrices of all linear layers that take what the norm gives.
    biases
        Their biases by name of the matrix, where they have one.
    reason
        Why it cannot be folded; empty where it can.
    """

    scale: str
    shift: str | None = None
    weights: tuple[str, ...] = ()
    biases: Mapping[str, str] | None = None
    reason: str = ""

    @property
    def changed(self) -> set[str]:
        """All parameters that folding changes."""
        own = {self.scale, *self.weights, *(self.biases or {}).values()}
        return own if self.shift is None else own | {self.shift}


def norms_of(model: nn.Module, example: Any, frozen: Collection[str] = ()) -> list[Fold]:
    """Layer and RMS norms with a scale of their own, in order, and how each is folded or why it cannot be.

    Parameters
    ----------
    model
        A copy, in eval mode.
    example
        On its device, see :func:`~fedmerge.permutations.trace`.
    frozen
        Parameters that may not be changed.

    Raises
    ------
    ModelError
        The model cannot be exported.

    Examples
    --------
    >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)).eval()
    >>> [(fold.scale, fold.shift, fold.weights) for fold in norms_of(model, torch.zeros(2, 4))]
    [('0.weight', '0.bias', ('1.weight',))]
    """
    graph = exported(model, example)
    names = graph.parameters
    folds = [_fold(node, names) for node in graph.graph.nodes if _scale_of(node, names) is not None]
    times = {fold.scale: sum(other.scale == fold.scale for other in folds) for fold in folds}
    return [
        fold
        if fold.reason
        else Fold(fold.scale, fold.shift, reason="it serves in several places")
        if times[fold.scale] > 1
        else Fold(fold.scale, fold.shift, reason="what it would change is frozen (requires_grad=False)")
        if fold.changed & set(frozen)
        else fold
        for fold in folds
    ]


def folded(state: State, folds: Collection[Fold]) -> dict[str, Tensor]:
    """The state with the scales and shifts of norms in the layers behind them: 1 and 0 are left of them.

    ``W' = W diag(scale)``, ``b' = b + W shift``. A layer without bias loses ``W shift``: that is right only where
    nothing depends on it, as on what is the same for all keys of attention.

    Examples
    --------
    >>> state = {"n": torch.tensor([2.0]), "s": torch.tensor([1.0]), "w": torch.tensor([[3.0]]), "b": torch.zeros(1)}
    >>> {n: t.flatten().tolist() for n, t in folded(state, [Fold("n", "s", ("w",), {"w": "b"})]).items()}
    {'n': [1.0], 's': [0.0], 'w': [6.0], 'b': [3.0]}
    """
    moved = dict(state)
    for fold in folds:
        scale = moved[fold.scale]
        wide = accumulator_dtype(scale.dtype)
        for weight in fold.weights:
            matrix, bias = moved[weight].to(wide), (fold.biases or {}).get(weight)
            if bias is not None and fold.shift is not None:
                moved[bias] = (moved[bias].to(wide) + matrix @ moved[fold.shift].to(wide)).to(moved[bias].dtype)
            moved[weight] = (matrix * scale.to(wide)).to(moved[weight].dtype)
        moved[fold.scale] = torch.ones_like(scale)
        if fold.shift is not None:
            moved[fold.shift] = torch.zeros_like(moved[fold.shift])
    return moved


def _scale_of(node: Any, names: Mapping[str, str]) -> tuple[str, str | None] | None:
    """Names of the scale and shift that an operator multiplies its input by; None where it is no norm's."""
    kind = _kind(node)
    if kind in ("layer_norm", "rms_norm"):
        scale, shift = (node.args[i] if len(node.args) > i else None for i in (2, 3))
        named = _name(scale, names)
        return None if named is None else (named, _name(shift, names) if kind == "layer_norm" else None)
    if kind == "mul":  # a norm written by hand ends in it
        for i, other in ((0, 1), (1, 0)):
            named = _name(node.args[i], names)
            if named is not None and node.args[i].meta["val"].ndim == 1 and _name(node.args[other], names) is None:
                return named, None
    return None


def _fold(node: Any, names: Mapping[str, str]) -> Fold:
    scale, shift = _scale_of(node, names) or ("", None)
    weights: list[str] = []
    biases: dict[str, str] = {}
    for user, value in _consumers(node):
        weight = _name(user.args[1], names) if _kind(user) == "linear" and user.args[0] is value else None
        if weight is None:
            return Fold(scale, shift, reason=f"what it gives goes into {_kind(user) or 'the output'}")
        if len(user.args[1].users) > 1:
            return Fold(scale, shift, reason=f"{weight!r}, behind it, is tied to other weights")
        weights.append(weight)
        bias = _name(user.args[2], names) if len(user.args) > 2 else None
        if bias is not None:
            biases[weight] = bias
    return Fold(scale, shift, tuple(weights), biases)


def _consumers(node: Any) -> Iterator[tuple[Any, Any]]:
    """What takes the values of a node, behind operators that only move them; each with the node that it takes."""
    for user in node.users:
        if _kind(user) in _PASSING:
            yield from _consumers(user)
        else:
            yield user, node


def _kind(node: Any) -> str:
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    return "" if schema is None else str(schema.name.partition("::")[2])


def _name(node: Any, names: Mapping[str, str]) -> str | None:
    return names.get(node.name) if isinstance(node, torch.fx.Node) else None
