"""Models that hostile clients send: kinds of numbers, values, shapes, widths, names, tied tensors, buffers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from fedmerge.state import LARGEST, State, is_norm_statistic
from tests.hostile.kind import Kind, table

__all__ = ["STATES"]

Change = Callable[[Tensor], Tensor]


def _trained(state: State) -> list[str]:
    return [n for n, t in state.items() if t.is_floating_point() and t.numel() and not is_norm_statistic(n)
            and n.rpartition(".")[2] in ("weight", "bias", "temperature")]  # fmt: skip


def _of(state: State, names: list[str], change: Change) -> dict[str, Tensor]:
    return {n: change(t.clone()) if n in names else t for n, t in state.items()}


def _all(change: Change):
    return lambda rng, state, model: _of(state, _trained(state), change)


def _one(change: Change):
    return lambda rng, state, model: _of(state, [rng.choice(_trained(state))], change)


def _entry(number: float, dtype: torch.dtype | None = None) -> Change:
    """One entry, in the middle."""

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.to(dtype or tensor.dtype)
        tensor.view(-1)[tensor.numel() // 2] = number
        return tensor

    return change


def _filled(number: float, dtype: torch.dtype | None = None) -> Change:
    return lambda tensor: torch.full_like(tensor, number, dtype=dtype or tensor.dtype)


def _signs(number: float) -> Change:
    """Entries of both signs, as far apart as can be."""
    return lambda tensor: torch.where(torch.arange(tensor.numel()).reshape(tensor.shape) % 2 == 0, number, -number).to(
        tensor.dtype
    )


def _matrix(state: State) -> str | None:
    return next((n for n in _trained(state) if state[n].ndim >= 2), None)


def _reshaped(change: Change):
    def make(rng: random.Random, state: State, model: State):
        name = _matrix(state)
        return None if name is None else _of(state, [name], lambda t: change(t).clone())

    return make


def resized(state: State, old: int, new: int) -> dict[str, Tensor] | None:
    """Every axis of size `old` of layers made `new` long: by copies where it grows."""
    names = [n for n, t in state.items() if "." in n and old in t.shape]
    if not names or old == new:
        return None

    def change(tensor: Tensor) -> Tensor:
        for axis, size in enumerate(tensor.shape):
            if size == old:
                tensor = tensor.index_select(axis, torch.arange(new) % old)
        return tensor

    return _of(state, names, change)


def _width(new: Callable[[int], int], last: bool = False):
    """Another number of hidden units, or of classes."""

    def make(rng: random.Random, state: State, model: State):
        matrices = [n for n in _trained(state) if state[n].ndim >= 2]
        if len(matrices) < (1 if last else 2):
            return None
        size = state[matrices[-1 if last else 0]].shape[0]
        return resized(state, size, new(size))

    return make


def _renamed(name: Callable[[str], str]):
    def make(rng: random.Random, state: State, model: State):
        old = rng.choice(_trained(state))
        return {name(n) if n == old else n: t for n, t in state.items()}

    return make


def _missing(rng: random.Random, state: State, model: State):
    gone = rng.choice(_trained(state))
    return {n: t for n, t in state.items() if n != gone}


def _with(extra: Callable[[State], dict[str, Tensor]]):
    return lambda rng, state, model: {**state, **extra(state)}


def _untied(rng: random.Random, state: State, model: State):
    """Tensors that are one in the model, sent as two."""
    names = [n for n in _trained(model) if model[n].numel() > 1]
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if model[one].shape == model[other].shape and torch.equal(model[one], model[other]):
                if model[one].std() == 0:
                    continue  # biases of zeros are equal by chance
                return _of(state, [other], lambda t: t + 1)
    return None


def _buffers(ending: str, change: Change):
    def make(rng: random.Random, state: State, model: State):
        names = [n for n in state if n.endswith(ending)]
        return _of(state, names, change) if names else None

    return make


def _dropped(rng: random.Random, state: State, model: State):
    names = [n for n in state if is_norm_statistic(n)]
    return {n: t for n, t in state.items() if n not in names} if names else None


def _shuffled(rng: random.Random, state: State, model: State):
    names = list(state)
    rng.shuffle(names)
    return {n: state[n] for n in names}


def _moved(factor: float):
    """The honest update times a factor."""

    def make(rng: random.Random, state: State, model: State):
        return _of(state, [], lambda t: t) | {n: model[n] + factor * (state[n] - model[n]) for n in _trained(state)}

    return make


def _noise(rng: random.Random, state: State, model: State):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return _of(state, _trained(state), lambda t: t + torch.randn(t.shape, generator=generator).to(t))


def _kind(name: str, make, must_drop: bool = True, **more: bool) -> Kind:
    return Kind(name, "state", make, must_drop, **more)


_CASTS = {torch.float64: False, torch.float16: False, torch.bfloat16: False, torch.int64: True, torch.int8: True,
          torch.uint8: True, torch.bool: True, torch.complex64: True, torch.complex128: True}  # fmt: skip
_SHAPES: dict[str, Change] = {
    "flattened": lambda t: t.reshape(-1),
    "with one more axis": lambda t: t[None],
    "with nine axes": lambda t: t.reshape(*t.shape, *[1] * (9 - t.ndim)),
    "one row, to be broadcast": lambda t: t[:1],
    "one number, to be broadcast": lambda t: t.reshape(-1)[0],
    "without rows": lambda t: t[:0],
    "without columns": lambda t: t[:, :0],
    "one row more": lambda t: torch.cat([t, t[:1]]),
}
_NAMES: dict[str, Callable[[str], str]] = {
    "with a blank behind it": lambda n: n + " ",
    "with a prefix": lambda n: "module." + n,
    "that is a path": lambda n: "../../" + n,
    "that says it is packed": lambda n: n + "#upper",
    "with control characters": lambda n: n + "\x1b[31m\x07\n",
    "of 10,000 characters": lambda n: n * (10_000 // len(n)),
    "that is empty": lambda n: "",
}
_COUNTER = "num_batches_tracked"

STATES = table(
    "state",
    *(_kind(f"all {d} ".replace("torch.", "").strip(), _all(lambda t, d=d: t.to(d)), bad) for d, bad in _CASTS.items()),
    *(_kind(f"one tensor {d}".replace("torch.", ""), _one(lambda t, d=d: t.to(d)), b) for d, b in _CASTS.items()),
    _kind("1e300 in doubles, everywhere", _all(_filled(1e300, torch.float64))),
    _kind("1e300 in doubles, one entry", _one(_entry(1e300, torch.float64))),
    _kind("-1e300 in doubles, one entry of all", _all(_entry(-1e300, torch.float64))),
    _kind("at the bound, everywhere", _all(_filled(LARGEST)), must_drop=False),
    _kind("at the bound, one entry", _one(_entry(-LARGEST)), must_drop=False),
    _kind("at the bound, both signs", _all(_signs(LARGEST)), must_drop=False),
    _kind("at the bound, in doubles", _all(_signs(LARGEST * (1 - 1e-12))), must_drop=False),
    _kind("beyond the bound, one entry", _one(_entry(2 * LARGEST))),
    _kind("3e38, both signs", _all(_signs(3e38))),
    *(_kind(f"{x} in one entry", _one(_entry(x))) for x in (math.nan, math.inf, -math.inf)),
    *(_kind(f"{x} everywhere", _all(_filled(x))) for x in (math.nan, math.inf)),
    _kind("1e-45 everywhere", _all(_filled(1e-45)), must_drop=False),
    _kind("zeros", _all(torch.zeros_like), must_drop=False),
    _kind("one tensor zeros", _one(torch.zeros_like), must_drop=False),
    _kind("all entries of a tensor equal", _all(_filled(0.5)), must_drop=False),
    _kind("of sixty orders", _all(lambda t: t * torch.logspace(-45, 14, max(1, t.numel())).reshape(t.shape)), False),
    _kind("entries of the model sent", lambda rng, state, model: dict(model), must_drop=False),
    _kind("transposed", _reshaped(lambda t: t.transpose(0, 1))),
    *(_kind(f"a matrix {name}", _reshaped(change)) for name, change in _SHAPES.items()),
    *(_kind(f"width {n}", _width(lambda _, n=n: n), wide=True) for n in (0, 1, 2)),
    _kind("one unit more", _width(lambda n: n + 1), wide=True),
    _kind("twice as wide", _width(lambda n: 2 * n), wide=True),
    _kind("a hundred times as wide", _width(lambda n: 100 * n)),
    *(_kind(f"{n} classes", _width(lambda _, n=n: n, last=True)) for n in (0, 1, 2)),
    _kind("one class more", _width(lambda n: n + 1, last=True)),
    *(_kind(f"a name {how}", _renamed(change)) for how, change in _NAMES.items()),
    _kind("a tensor missing", _missing),
    _kind("no tensors", lambda rng, state, model: {}),
    _kind("a tensor that nobody asked for", _with(lambda s: {"extra.weight": torch.zeros(1)})),
    _kind("a million bytes of padding", _with(lambda s: {"padding": torch.zeros(250_000)})),
    _kind("two thousand tensors of padding", _with(lambda s: {f"p{i}.weight": torch.zeros(0) for i in range(2000)})),
    _kind("names in another order", _shuffled, must_drop=False),
    _kind("tied tensors that differ", _untied),
    _kind("variances negative", _buffers("running_var", lambda t: -t - 1)),
    _kind("variances NaN", _buffers("running_var", _filled(math.nan))),
    _kind("variances infinite", _buffers("running_var", _filled(math.inf))),
    _kind("variances zero", _buffers("running_var", torch.zeros_like), must_drop=False),
    _kind("variances at the bound", _buffers("running_var", _filled(LARGEST)), must_drop=False),
    _kind("variances beyond the bound", _buffers("running_var", _filled(1e30))),
    _kind("means NaN", _buffers("running_mean", _entry(math.nan))),
    _kind("means at the bound", _buffers("running_mean", _signs(LARGEST)), must_drop=False),
    _kind("means in doubles", _buffers("running_mean", lambda t: t.double()), must_drop=False),
    _kind("means of another shape", _buffers("running_mean", lambda t: t[:-1])),
    _kind("a counter negative", _buffers(_COUNTER, lambda t: t - 2**40), must_drop=False),
    _kind("a counter at its end", _buffers(_COUNTER, lambda t: torch.full_like(t, 2**63 - 1)), must_drop=False),
    _kind("a counter NaN", _buffers(_COUNTER, lambda t: torch.full_like(t, math.nan, dtype=torch.float32))),
    _kind("a counter with an axis", _buffers(_COUNTER, lambda t: t[None])),
    _kind("buffers missing", _dropped),
    _kind("the update turned about", _moved(-1.0), must_drop=False, lie=True),
    _kind("the update four times as long, turned about", _moved(-4.0), must_drop=False, lie=True),
    _kind("the update ten times as long", _moved(10.0), must_drop=False, lie=True),
    _kind("noise on the update", _noise, must_drop=False, lie=True),
)
