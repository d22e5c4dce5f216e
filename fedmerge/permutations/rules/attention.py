"""Products of activations: heads exchange as blocks, the dimensions of a head within it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedmerge.permutations.labels import Labels, Vector
from fedmerge.permutations.rules.contraction import contraction
from fedmerge.permutations.rules.linear import product
from fedmerge.permutations.rules.pointwise import met
from fedmerge.permutations.rules.reduction import reduced
from fedmerge.permutations.rules.rule import Call, Outcome, rule, tensors_in
from fedmerge.permutations.values import Value, pin_all, settle

__all__: list[str] = []


_LETTERS = "abcdefghijklmnopqrstuvw"


def _matrices(labels: Labels, x: Value, y: Value, shape: tuple[int, ...]) -> Value:
    """``x @ y`` for x [..., n, k] and y [..., k, m]; vectors are rows of x and columns of y."""
    batch = len(shape) - (len(x.shape) > 1) - (len(y.shape) > 1)
    left = ("x" if len(x.shape) > 1 else "") + "y"
    right = "y" + ("z" if len(y.shape) > 1 else "")
    names = _LETTERS[:batch]
    own = [names[batch - max(len(v.shape) - 2, 0) :] + rest for v, rest in ((x, left), (y, right))]
    return contraction(labels, [x, y], own, names + left[:-1] + right[1:], shape)


@rule("matmul", "bmm", "mm", "mv", "dot", "vdot")
def matmul(call: Call) -> Outcome:
    """A product with a weight, or of two activations."""
    x, y = call.tensors
    if len(x.shape) > 1 and len(y.shape) == 2 and len(y.factors) == 2:
        return product(call, x, y, 0, None)
    return _matrices(call.labels, x, y, call.shape)


@rule("baddbmm")
def baddbmm(call: Call) -> Outcome:
    """``s + x y``."""
    product = _matrices(call.labels, call["batch1"], call["batch2"], call.shape)
    return settle(call.labels, call.shape, met(call.labels, [product, call["self"]], call.shape))


@rule("einsum")
def einsum(call: Call) -> Outcome:
    """Any number of tensors; axes that one tensor names twice are pinned."""
    labels, values = call.labels, list(tensors_in(call["tensors"]))
    inputs, arrow, out = call["equation"].replace(" ", "").partition("->")
    letters = inputs.split(",")
    if "..." in call["equation"]:
        most = max(len(v.shape) - len(own.replace("...", "")) for v, own in zip(values, letters, strict=True))
        dots = "".join(x for x in _LETTERS + _LETTERS.upper() if x not in call["equation"])[:most]
        for i, (value, own) in enumerate(zip(values, letters, strict=True)):
            missing = len(value.shape) - len(own.replace("...", ""))
            letters[i] = own.replace("...", dots[most - missing :])
        out = out.replace("...", dots) if arrow else dots
    if not arrow:
        seen = "".join(letters)
        out += "".join(sorted(x for x in set(seen) if seen.count(x) == 1 and x not in out))
    if any(len(set(own)) < len(own) for own in letters):
        pin_all(labels, values, "an axis of it is named twice")
        return settle(labels, call.shape, [])
    return contraction(labels, values, letters, out, call.shape)


def copied(labels: Labels, value: Value, times: int, axis: int) -> Value:
    """Each place of an axis repeated: copies move with what they copy, and may be exchanged among themselves."""
    axis %= len(value.shape)
    shape = tuple(size * times if a == axis else size for a, size in enumerate(value.shape))

    def repeated(grid: Vector) -> Vector:
        if grid.shape[axis] == 1:
            return grid
        before, after = grid.shape[: axis + 1], grid.shape[axis + 1 :]
        copies = labels.copies(np.expand_dims(grid, axis + 1), (*before, times, *after))
        return copies.reshape(*before[:-1], -1, *after)

    factors = tuple(repeated(grid) for grid in value.factors)
    even = value.even | ({axis} if value.shape[axis] == 1 and times > 1 else set())
    return replace(value, shape=shape, factors=factors, even=frozenset(even), name=None)


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Outcome:
    """``softmax(q k^T + mask) v``; where there are fewer keys than queries, each serves several heads."""
    labels, q, k, v, mask = call.labels, call["query"], call["key"], call["value"], call["attn_mask"]
    if call.arguments.get("dropout_p"):
        pin_all(labels, [q, k, v], "what it attends to is dropped at random")
    if call.arguments.get("enable_gqa"):
        k, v = (copied(labels, part, q.shape[-3] // part.shape[-3], -3) for part in (k, v))
    batch = _LETTERS[: len(q.shape) - 2]
    own = [batch[len(q.shape) - len(part.shape) :] for part in (q, k, v)]
    shape = (*np.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2], k.shape[-2])
    scores = contraction(labels, [q, k], [own[0] + "xz", own[1] + "yz"], batch + "xy", shape)
    if mask is not None:
        scores = settle(labels, shape, met(labels, [scores, mask], shape))
    return contraction(labels, [scores, v], [batch + "xy", own[2] + "yz"], batch + "xz", call.shape)


@rule("cosine_similarity")
def cosine_similarity(call: Call) -> Outcome:
    """Entries meet, then are summed over one axis, as are their squares."""
    x, y = call["x1"], call["x2"]
    sizes = np.broadcast_shapes(x.shape, y.shape)
    axis = call["dim"] % len(sizes)
    grids = reduced(call.labels, met(call.labels, [x, y], sizes), (axis,))
    return settle(call.labels, call.shape, [np.squeeze(grid, axis) for grid in grids])
