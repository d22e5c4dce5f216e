"""Operators that only move entries: they are run on the labels themselves."""

from __future__ import annotations

import numpy as np
import torch

from fedmerge.permutations.labels import Labels, Vector
from fedmerge.permutations.rules.linear import along
from fedmerge.permutations.rules.pointwise import joined, met
from fedmerge.permutations.rules.rule import Call, Outcome, rule, tensors_in
from fedmerge.permutations.values import Value, factor_at, pin_all, settle, take_vector

__all__: list[str] = []

_LIKE = {"expand_as", "view_as", "reshape_as"}  # only the shape of the other tensor matters
_EXPAND = {"expand", "expand_as", "broadcast_to", "repeat", "tile"}
_COPY = {"repeat", "tile", "repeat_interleave"}


@rule(
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
    "numpy_T", "movedim", "moveaxis", "swapaxes", "expand", "expand_as", "broadcast_to", "select", "slice", "narrow",
    "chunk", "split", "split_with_sizes", "unbind", "tensor_split", "flip", "roll", "repeat", "tile",
    "repeat_interleave", "diagonal", "pixel_unshuffle", "channel_shuffle", "unfold", "view_as", "reshape_as",
    "unsafe_chunk",
    "unsafe_split", "mT", "matrix_H", "adjoint", "squeeze_", "unsqueeze_", "transpose_", "t_", "atleast_2d",
)  # fmt: skip
def moved(call: Call) -> Outcome:
    """One tensor whose entries are put elsewhere, repeated or left out."""
    name = next(name for name, argument in call.arguments.items() if isinstance(argument, Value))
    value: Value = call[name]
    if call.operator not in _LIKE:
        pin_all(call.labels, call.tensors[1:], "it tells where entries go")
    results: list[list[Vector]] = [[] for _ in call.shapes]
    for grid in value.factors:
        for kept, labels in zip(results, _moved(call, name, value, grid), strict=True):
            kept.append(labels)
    even = _even(call, name, value)
    values = []
    for shape, kept, copies in zip(call.shapes, results, even, strict=True):
        result = settle(call.labels, shape, _one_for_each_axis(call.labels, kept))
        values.append(Value(result.shape, result.factors, value.uniform, even=copies))
    return values[0] if call.single else tuple(values)


def _moved(call: Call, name: str, value: Value, grid: Vector) -> list[Vector]:
    """A grid after the operator, for each output; entries that are exact copies get labels of their own."""
    moved_labels = [_plain(f) for f in _run(call, name, np.broadcast_to(grid, value.shape))]
    if np.unique(grid).size < grid.size or all(np.unique(f).size == f.size for f in moved_labels):
        return moved_labels
    if call.operator in _COPY:
        return [call.labels.copies(f, f.shape) for f in moved_labels]
    if value.even:  # it was expanded before, and now copies come to stand on an axis of neurons
        shape = tuple(s if grid.shape[a] > 1 or a in value.even else 1 for a, s in enumerate(value.shape))
        copies = call.labels.copies(grid, shape)
        return _run(call, name, np.broadcast_to(copies, value.shape))
    return moved_labels


def _even(call: Call, name: str, value: Value) -> list[frozenset[int]]:
    """For each output the axes along which it holds copies: those along which numbers of entries do not change."""
    if not value.even and call.operator not in _EXPAND:
        return [frozenset()] * len(call.shapes)
    sizes = tuple(1 if a in value.even else s for a, s in enumerate(value.shape))
    numbers = np.arange(int(np.prod(sizes))).reshape(sizes)
    pieces = []
    for entries in _run(call, name, np.broadcast_to(numbers, value.shape)):
        plain = _plain(entries)
        pieces.append(frozenset(a for a, s in enumerate(entries.shape) if s > 1 and plain.shape[a] == 1))
    return pieces


def _plain(grid: Vector) -> Vector:
    """A grid with size 1 along axes on which nothing changes."""
    for axis in range(grid.ndim):
        head = grid.take([0], axis)
        if grid.shape[axis] > 1 and (grid == head).all():
            grid = head
    return grid


def _one_for_each_axis(labels: Labels, grids: list[Vector]) -> list[Vector]:
    """Grids that have come to share an axis, as heads and their dimensions do when they are put into one, in one."""
    vectors: list[Vector] = []
    for new in map(_plain, grids):
        shared = [old for old in vectors if any(a > 1 and b > 1 for a, b in zip(old.shape, new.shape, strict=True))]
        vectors = [old for old in vectors if all(old is not s for s in shared)]
        vectors.append(joined(labels, [*shared, new]) if shared else new)
    return vectors


def _run(call: Call, name: str, entries: Vector) -> list[Vector]:
    full = torch.from_numpy(entries.copy())
    others = {k: torch.empty(v.shape) if isinstance(v, Value) else v for k, v in call.arguments.items() if k != name}
    out = call.target(full, **others) if name == "self" else call.target(**others, **{name: full})
    return [t.numpy() for t in ([out] if isinstance(out, torch.Tensor) else out)]


@rule("view_as_complex")
def view_as_complex(call: Call) -> Outcome:
    """The two parts of a number move together."""
    value: Value = call["self"]
    kept = []
    for grid in value.factors:
        call.labels.tie(grid, grid[..., :1])
        kept.append(grid[..., 0])
    return settle(call.labels, call.shape, kept)


@rule("view_as_real")
def view_as_real(call: Call) -> Outcome:
    """A number's two parts are one neuron."""
    return settle(call.labels, call.shape, [grid[..., None] for grid in call["self"].factors])


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Outcome:
    """The channels that become pixels of one channel stay in their order; the channel as a whole may move."""
    value: Value = call["self"]
    channels, others = take_vector(call.labels, value, -3, "", whole=True)
    rows = channels.reshape(call.shape[-3], -1)
    call.labels.tie(rows, rows[:, :1])
    return settle(call.labels, call.shape, [*others, along(rows[:, 0], -3, len(call.shape))])


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Outcome:
    """Labels joined along the axis; along the others, tensors meet."""
    values = [v for v in tensors_in(call["tensors"]) if v.shape != (0,)]
    axis = call["dim"] % len(call.shape)
    joined = [factor_at(v, axis) for v in values]
    rest = [Value((*v.shape[:axis], 1, *v.shape[axis + 1 :]), tuple(g for g in v.factors if g is not j), v.uniform)
            for v, j in zip(values, joined, strict=True)]  # fmt: skip
    meeting = tuple(1 if a == axis else s for a, s in enumerate(call.shape))
    if all(j is None for j in joined):
        return settle(call.labels, call.shape, met(call.labels, rest, meeting))
    grids = [np.zeros((1,) * len(call.shape), dtype=np.int64) if j is None else j for j in joined]
    sizes = np.broadcast_shapes(*((*g.shape[:axis], 1, *g.shape[axis + 1 :]) for g in grids))
    parts = [np.broadcast_to(g, (*sizes[:axis], v.shape[axis], *sizes[axis + 1 :]))
             for g, v in zip(grids, values, strict=True)]  # fmt: skip
    return settle(call.labels, call.shape, [np.concatenate(parts, axis), *met(call.labels, rest, meeting)])


@rule("stack")
def stack(call: Call) -> Outcome:
    """Tensors side by side along a new axis."""
    values = list(tensors_in(call["tensors"]))
    axis = call["dim"] % len(call.shape)
    count = max((len(v.factors) for v in values), default=0)
    if any(len(v.factors) != count for v in values):
        pin_all(call.labels, values, "it is stacked onto something that is no neuron")
        return settle(call.labels, call.shape, [])
    grids = []
    for i in range(count):
        parts = [np.expand_dims(v.factors[i], axis) for v in values]
        if len({p.shape for p in parts}) > 1:
            pin_all(call.labels, values, "it is stacked onto neurons of other axes")
            return settle(call.labels, call.shape, [])
        grids.append(np.concatenate(parts, axis))
    return settle(call.labels, call.shape, grids)


@rule("index")
def index(call: Call) -> Outcome:
    """``x[i, :, j]``: axes without neurons are as good as each other, whatever the indices are."""
    value, indices = call["self"], list(call["indices"])
    pin_all(call.labels, [v for v in indices if v is not None], "it chooses entries")
    indexed = [a for a, entry in enumerate(indices) if entry is not None]
    where = tuple(slice(None) if v is None else np.zeros(v.shape, dtype=int) for v in indices)
    kept = []
    for grid in value.factors:
        if any(grid.shape[a] > 1 for a in indexed):
            call.labels.pin(grid, "single entries of it are chosen")
        else:
            kept.append(np.broadcast_to(grid, value.shape)[where])
    return settle(call.labels, call.shape, kept)


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
      "zero_pad2d", "_pad_circular")  # fmt: skip
def pad(call: Call) -> Outcome:
    """More entries at the ends of the last axes, which must not be neurons."""
    value = call.tensors[0]
    grown = [a for a, (old, new) in enumerate(zip(value.shape, call.shape, strict=True)) if old != new]
    kept = []
    for grid in value.factors:
        if any(grid.shape[a] > 1 for a in grown):
            call.labels.pin(grid, "it is padded")
        else:
            kept.append(grid)
    return settle(call.labels, call.shape, kept)
