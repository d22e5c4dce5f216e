"""Statistics that hostile clients send: ``kind(rng, value, name)`` gives what is sent by statistic, ``{}`` for nothing.

``value`` is the honest value as it was measured; what is sent may also be in parts, as compression sends it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedmerge.state import State
from fedmerge.statistics.sending.compression import decode, encode
from tests.hostile.kind import Kind, table

__all__ = ["STATISTICS", "spoilt_statistic"]

Change = Callable[[Tensor], Tensor]
_SIGNED = ("loss_gradient", "head_gradient", "head_sums", "secants", "activations", "refit_sums", "batch_norm",
           "surgery_sums", "entropy_gradient", "batch_norm_sums", "class_moments", "prefix_sums",
           "loss_slopes", "entropy_slopes")  # fmt: skip
"""Whose tensors that are no square matrices may well have negative entries."""


def spoilt_statistic(kind: Kind, rng: random.Random, sent: Mapping[str, State]) -> dict[str, State] | None:
    """Statistics of which one is hostile; None where the kind is of none of them."""
    told = [name for name in sorted(sent) if decode(sent[name])]  # one without entries cannot be spoilt
    for name in rng.sample(told, len(told)):
        found = kind(rng, decode(sent[name]), name)
        if found is not None:
            return {**{n: value for n, value in sent.items() if n != name}, **found}
    return None


def _floats(value: State) -> list[str]:
    return [n for n, t in value.items() if t.is_floating_point() and t.numel()]


def _squares(value: State) -> list[str]:
    found = []
    for name in _floats(value):
        t = value[name]
        square = t.ndim in (2, 3) and t.shape[-1] == t.shape[-2] > 1
        if square and torch.allclose(t, t.transpose(-1, -2), rtol=1e-4, atol=1e-6 * float(t.abs().max())):
            found.append(name)
    return found


def _sent(value: State, names: list[str], change: Change, name: str) -> dict[str, State]:
    return {name: {n: change(t.clone()) if n in names else t for n, t in value.items()}}


def _all(change: Change):
    def make(rng: random.Random, value: State, name: str):
        return _sent(value, list(value), change, name) if value else None

    return make


def _some(change: Change, names: Callable[[State], list[str]] = _floats, one: bool = True):
    """One of the tensors that `names` finds, or all of them."""

    def make(rng: random.Random, value: State, name: str):
        found = names(value)
        if not found:
            return None
        return _sent(value, [rng.choice(found)] if one else found, change, name)

    return make


def _of_layers(change: Change):
    """All tensors, but where they are a few numbers."""
    return lambda rng, value, name: None if name in ("local_steps", "class_counts") else _all(change)(rng, value, name)


def _entry(number: float, dtype: torch.dtype | None = None) -> Change:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.to(dtype or tensor.dtype)
        tensor.view(-1)[-1] = number  # on the diagonal, where it is a matrix
        return tensor

    return change


def _indefinite(tensor: Tensor) -> Tensor:
    """The diagonal as it was and positive, beside it what no diagonal can carry."""
    size = tensor.shape[-1]
    scale = tensor.diagonal(dim1=-2, dim2=-1).abs().amax(-1)[..., None, None].clamp_min(1e-3)
    found = 5 * scale * torch.ones(size, size, dtype=tensor.dtype)
    found = found.expand(tensor.shape).clone()
    found.diagonal(dim1=-2, dim2=-1).copy_(scale[..., 0].expand(*tensor.shape[:-1]))
    return found


def _barely(tensor: Tensor) -> Tensor:
    """One eigenvalue negative by a tenth of the largest, on a direction that is no axis; the trace stays positive."""
    size = tensor.shape[-1]
    vector = torch.ones(size, dtype=tensor.dtype) / math.sqrt(size)
    largest = torch.linalg.matrix_norm(tensor.double(), 2).to(tensor.dtype)[..., None, None]
    along = (vector @ tensor @ vector)[..., None, None] if tensor.ndim == 3 else vector @ tensor @ vector
    flat = tensor - (along + 0.1 * largest) * torch.outer(vector, vector)
    return (flat + flat.transpose(-1, -2)) / 2


def _askew(tensor: Tensor) -> Tensor:
    rows = torch.arange(tensor.shape[-1], dtype=tensor.dtype)
    return tensor + tensor.abs().max().clamp_min(1e-3) * (rows[:, None] - rows[None, :])


def _without(number: Callable[[int], int]):
    def make(rng: random.Random, value: State, name: str):
        if len(value) < 2 or name == "local_steps":  # of which all but the steps may be left out
            return None
        gone = rng.sample(sorted(value), max(1, min(len(value) - 1, number(len(value)))))
        return {name: {n: t for n, t in value.items() if n not in gone}}

    return make


def _layer_missing(rng: random.Random, value: State, name: str):
    """A layer whole: nothing that is left tells that it was there."""
    layers = sorted({n.split(".")[0] for n in value})
    if len(layers) < 2 or name == "local_steps":
        return None
    gone = rng.choice(layers)
    return {name: {n: t for n, t in value.items() if n.split(".")[0] != gone}}


def _renamed(how: Callable[[str], str]):
    def make(rng: random.Random, value: State, name: str):
        if name == "local_steps":
            return None
        old = rng.choice(sorted(value))
        return {name: {how(n) if n == old else n: t for n, t in value.items()}}

    return make


def _extra(more: Callable[[], dict[str, Tensor]]):
    return lambda rng, value, name: {name: {**value, **more()}}


def _swapped(rng: random.Random, value: State, name: str):
    names = sorted(value)
    other = next(((a, b) for a in names for b in names if a < b and value[a].shape != value[b].shape), None)
    return None if other is None else {name: {**value, other[0]: value[other[1]], other[1]: value[other[0]]}}


def _packed(level: str, spoil: Callable[[random.Random, dict[str, Tensor]], dict[str, Tensor] | None]):
    """Parts as compression sends them, of which one lies."""

    def make(rng: random.Random, value: State, name: str):
        sent = dict(encode(value, level, 10**6).state)  # type: ignore[arg-type]
        found = spoil(rng, sent) if any("#" in n for n in sent) else None
        return None if found is None else {name: found}

    return make


def _part(change: Callable[[random.Random, Tensor], Tensor], *parts: str):
    def spoil(rng: random.Random, sent: dict[str, Tensor]):
        names = [n for n, t in sent.items() if "#" in n and (not parts or n.rpartition("#")[2] in parts) and t.numel()]
        if not names:
            return None
        name = rng.choice(names)
        return {**sent, name: change(rng, sent[name].clone())}

    return spoil


def _gone(rng: random.Random, sent: dict[str, Tensor]):
    name = rng.choice([n for n in sent if "#" in n])
    return {n: t for n, t in sent.items() if n != name}


def _filled(number: float):
    return lambda rng, tensor: torch.full_like(tensor, number, dtype=torch.float32)


def _claims(name: str, *parts: tuple[str, Tensor]):
    """A few bytes that say that they are a large matrix."""

    def make(rng: random.Random, value: State, statistic: str):
        chosen = rng.choice(sorted(value)) if value else "x"
        kept = {n: t for n, t in value.items() if n != chosen}
        return {statistic: {**kept, **{f"{chosen}#{part}": tensor for part, tensor in parts}}}

    return Kind(name, "statistic", make)


def _counts(change: Callable[[Tensor], Tensor]):
    def make(rng: random.Random, value: State, name: str):
        return {name: {name: change(value[name])}} if name == "class_counts" else None

    return make


def _steps(**told: float):
    def make(rng: random.Random, value: State, name: str):
        if name != "local_steps":
            return None
        return {name: {**value, **{n: torch.tensor(x, dtype=torch.float64) for n, x in told.items()}}}

    return make


def _negative(rng: random.Random, value: State, name: str):
    """Squares and counts that are negative, in what is no matrix."""
    names = [n for n in value if n not in _squares(value) and value[n].numel() and value[n].dtype.is_signed]
    if name in _SIGNED or not names:
        return None
    return _sent(value, [rng.choice(names)], lambda t: -t - 1, name)


def _kind(name: str, make, must_drop: bool = True, **more: bool) -> Kind:
    return Kind(name, "statistic", make, must_drop, **more)


_BAD = (torch.bool, torch.complex64)
_FINE = (torch.float64, torch.float16, torch.bfloat16)
_ints = _some(lambda t: t.long(), one=False)
_I8 = torch.int8

STATISTICS = table(
    "statistic",
    _kind("missing", lambda rng, value, name: {}),
    _kind("empty", lambda rng, value, name: {name: {}}),
    _kind("one tensor missing", _without(lambda n: 1)),
    _kind("half of it missing", _without(lambda n: n // 2)),
    _kind("all but one tensor missing", _without(lambda n: n - 1)),
    _kind("a layer missing", _layer_missing),
    _kind("another name", _renamed(lambda n: n + "x")),
    _kind("a name with a path", _renamed(lambda n: "../" + n)),
    _kind("names of control characters", _renamed(lambda n: n + "\x1b[31m\n")),
    _kind("a layer that there is not", _extra(lambda: {"99.weight.A": torch.eye(3)}), must_drop=False),
    _kind("a million bytes of padding", _extra(lambda: {"padding": torch.zeros(250_000)}), must_drop=False),
    _kind("two thousand tensors of padding", _extra(lambda: {f"p{i}": torch.zeros(0) for i in range(2000)}), False),
    *(_kind(f"all {d}".replace("torch.", ""), _of_layers(lambda t, d=d: t.to(d)), bad) for d, bad in
      [*((d, False) for d in _FINE), *((d, True) for d in _BAD)]),
    _kind("whole numbers", _ints, must_drop=False),
    *(_kind(f"{x} in one entry", _some(_entry(x))) for x in (math.nan, math.inf, -math.inf)),
    *(_kind(f"{x} everywhere", _some(lambda t, x=x: torch.full_like(t, x), one=False)) for x in (math.nan, math.inf)),
    _kind("1e300 in doubles, one entry", _some(_entry(1e300, torch.float64))),
    _kind("1e300 in doubles, everywhere", _some(lambda t: torch.full_like(t, 1e300, dtype=torch.float64), one=False)),
    _kind("-1e300 in doubles, one entry", _some(_entry(-1e300, torch.float64))),
    _kind("3e38, one entry", _some(_entry(3e38))),
    _kind("1e15, one entry", _some(_entry(1e15)), must_drop=False),
    _kind("zeros", _all(torch.zeros_like), must_drop=False),
    _kind("one tensor zeros", _some(torch.zeros_like), must_drop=False),
    _kind("tiny", _some(lambda t: t * 1e-38, one=False), must_drop=False),
    _kind("5e-324 in doubles", _some(lambda t: torch.full_like(t, 5e-324, dtype=torch.float64), one=False), False),
    _kind("of sixty orders", _some(lambda t: t * torch.logspace(-40, 14, t.numel()).reshape(t.shape).to(t)), False),
    _kind("turned about", _some(lambda t: -t, _squares, one=False)),
    _kind("a matrix turned about", _some(lambda t: -t, _squares)),
    _kind("negative", _negative),
    _kind("indefinite with a positive diagonal", _some(_indefinite, _squares)),
    _kind("all indefinite with positive diagonals", _some(_indefinite, _squares, one=False)),
    _kind("one eigenvalue negative", _some(_barely, _squares)),
    _kind("not symmetric", _some(_askew, _squares)),
    _kind("a negative entry on the diagonal", _some(lambda t: _entry(-float(t.abs().max()) - 1)(t), _squares)),
    _kind("of rank one", _some(torch.ones_like, _squares), must_drop=False),
    _kind("the identity", _some(lambda t: torch.eye(t.shape[-1]).expand(t.shape).to(t), _squares), must_drop=False),
    _kind("flattened", _some(lambda t: t.reshape(-1), _squares)),
    _kind("one row less", _some(lambda t: t[..., :-1, :-1], _squares)),
    _kind("one row more", _some(lambda t: torch.eye(t.shape[-1] + 2).to(t), _squares)),
    _kind("of size 0", _some(lambda t: t[..., :0, :0], _squares)),
    _kind("without entries", _some(lambda t: t[:0], lambda v: [n for n in _floats(v) if v[n].ndim])),
    _kind("with a hundred groups", _some(lambda t: t.reshape(-1, *t.shape[-2:])[:1].expand(100, -1, -1), _squares)),
    _kind("one more axis", _some(lambda t: t[None, None], _squares)),
    _kind("of other layers", _swapped),
    *(_kind(f"{level}, a part NaN", _packed(level, _part(_filled(math.nan)))) for level in ("float16", "int8")),
    *(_kind(f"{level}, a part infinite", _packed(level, _part(_filled(math.inf)))) for level in ("float16", "int8")),
    *(_kind(f"{level}, a part 3e38", _packed(level, _part(_filled(3e38))), False) for level in ("float16", "int8")),
    *(_kind(f"{level}, a part gone", _packed(level, _gone)) for level in ("none", "float16", "int8")),
    *(_kind(f"{level}, a part shorter", _packed(level, _part(lambda rng, t: t.reshape(-1)[:-1]))) for level in
      ("none", "float16", "int8")),
    *(_kind(f"{level}, {n} axes", _packed(level, _part(lambda rng, t, n=n: torch.tensor(n, dtype=_I8), "ndim")), False)
      for level in ("none", "float16", "int8") for n in (-3, 0, 2, 3, 100)),
    # What arrives indefinite in a form that rounds is mended as rounding is.
    _kind("float16, correlations of 2",
          _packed("float16", _part(lambda rng, t: torch.full_like(t, 2), "correlation")), must_drop=False),
    _kind("float16, correlations of -1 that are said to be definite",
          _packed("float16", _part(lambda rng, t: torch.full_like(t, -1), "correlation")), must_drop=False),
    _kind("float16, a diagonal that is negative", _packed("float16", _part(lambda rng, t: -t - 1, "diagonal"))),
    _kind("int8, negative peaks", _packed("int8", _part(lambda rng, t: -t - 1, "peaks", "peak", "left")), False),
    _claims("a correlation of 100,000 rows", ("correlation", torch.zeros(1, 0, dtype=torch.float16)),
            ("diagonal", torch.ones(1, 100_000)), ("ndim", torch.tensor(2, dtype=_I8))),
    _claims("eigenvectors of 100,000 rows", ("vectors", torch.zeros(1, 100_000, 0, dtype=_I8)),
            ("peaks", torch.zeros(1, 0)), ("left", torch.zeros(1, 100_000)), ("ndim", torch.tensor(2, dtype=_I8))),
    _claims("a part that nobody knows", ("secret", torch.zeros(3))),
    _kind("counts negative", _counts(lambda t: -t - 1)),
    _kind("counts zero", _counts(torch.zeros_like)),
    _kind("counts that are no whole numbers", _counts(lambda t: t + 0.5)),
    _kind("counts of 2^62", _counts(lambda t: torch.full_like(t, 2**62))),
    _kind("counts of 1e300", _counts(lambda t: torch.full(t.shape, 1e300, dtype=torch.float64))),
    _kind("a hundred times the examples", _counts(lambda t: 100 * t + 100)),
    _kind("counts of too few classes", _counts(lambda t: t[:-1])),
    _kind("counts of more classes", _counts(lambda t: torch.cat([t, t[:1] + 1]))),
    _kind("counts of a table", _counts(lambda t: t[None])),
    _kind("counts of the other classes", _counts(lambda t: t.flip(0)), must_drop=False, lie=True),
    *(_kind(f"steps {x}", _steps(local_steps=x)) for x in (0, -1, math.nan, math.inf, 1e300, 2.0**62, 5e-324)),
    *(_kind(f"momentum {x}", _steps(momentum=x)) for x in (-1, 1, 1e300, math.nan)),
    *(_kind(f"learning rate {x}", _steps(learning_rate=x, proximal_mu=1.0)) for x in (-1, 0, 1e300, math.nan)),
    _kind("a million steps", _steps(local_steps=1e6), must_drop=False, lie=True),
    _kind("a thousand times as large", _some(lambda t: 1000 * t, one=False), must_drop=False, lie=True),
    _kind("a thousandth of it", _some(lambda t: t / 1000, one=False), must_drop=False, lie=True),
)  # fmt: skip
