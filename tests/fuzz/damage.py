"""What is done to a whole thing to damage it: drawn by Hypothesis, so that a failure shrinks, and told in a line each.

A `Damage` is a function with its options. Places are whole numbers that the function takes modulo what there is, so
that no draw depends on another one or on what is damaged.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

HUGE = (0, 1, -1, 2**31, 2**62, 10**12, 10**18)
NUMBERS = st.sampled_from(
    (0, -1, 1, 2**63 - 1, -(2**63), 10**30, 1e308, 5e-324, float("nan"), float("inf"), -float("inf"), -0.0, 1e15)
)
TEXTS = ("", "x", "../../etc/passwd", "\0", "é" * 50, "__import__('os')", "-1", "1e999", "a.b.c#vectors", "(" * 200)
PLACES = st.integers(0, 99)


@dataclass(frozen=True)
class Damage:
    """One change: ``damage(whole)`` gives what is damaged, and leaves the whole as it was."""

    how: Callable[..., Any]
    options: dict[str, Any]

    def __call__(self, whole: Any) -> Any:
        return self.how(whole, **self.options)

    def __repr__(self) -> str:
        return f"{self.how.__name__}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


def damage(how: Callable[..., Any], **options: st.SearchStrategy[Any]) -> st.SearchStrategy[Damage]:
    """A change of this kind, with options drawn from these."""
    return st.builds(Damage, st.just(how), st.fixed_dictionaries(options))


def several(*kinds: st.SearchStrategy[Damage], most: int = 3) -> st.SearchStrategy[list[Damage]]:
    """One or more changes of these kinds."""
    return st.lists(st.one_of(*kinds), min_size=1, max_size=most)


def damaged(whole: Any, changes: Iterable[Damage]) -> Any:
    """What is left after the changes."""
    for change in changes:
        whole = change(whole)
    return whole


def at_place(things: Sequence[Any], place: int) -> Any:
    """The thing at a place, counted round."""
    return things[place % len(things)]


def flip_bit(content: bytes, at: int, bit: int) -> bytes:
    """Turn one bit."""
    at %= max(1, len(content))
    return content[:at] + bytes(byte ^ 1 << bit for byte in content[at : at + 1]) + content[at + 1 :]


def cut(content: bytes, at: int) -> bytes:
    """Leave out all from here."""
    return content[: at % max(1, len(content))]


def replace(content: bytes, at: int, length: int, by: bytes) -> bytes:
    """Put other bytes here; none, to leave some out."""
    at %= max(1, len(content))
    return content[:at] + by + content[at + length :]


def double(content: bytes, at: int) -> bytes:
    """Say 32 bytes twice."""
    at %= max(1, len(content))
    return content[:at] + content[at : at + 32] + content[at:]


def claim(content: bytes, at: int, number: int) -> bytes:
    """Put a huge number here."""
    at %= max(1, len(content))
    return content[:at] + struct.pack("<q", number) + content[at + 8 :]


_BYTES = st.integers(0, 300) | st.integers(0, 2**20)  # heads of files tell more than what they hold
EDITS = several(
    damage(flip_bit, at=_BYTES, bit=st.integers(0, 7)),
    damage(cut, at=_BYTES),
    damage(replace, at=_BYTES, length=st.integers(0, 16), by=st.binary(max_size=16)),
    damage(double, at=_BYTES),
    damage(claim, at=_BYTES, number=st.sampled_from((2**31, 2**62, -1, 10**12))),
    most=4,
)
"""Changes of bytes."""

SHAPES = st.lists(st.sampled_from((*HUGE, 2, 3, 4, 6, 10**40, 1.5, True)), max_size=5).map(tuple)
"""Shapes that may be of anything."""

VALUES = st.recursive(
    NUMBERS
    | st.sampled_from(TEXTS)
    | st.booleans()
    | st.integers(-3, 30)
    | st.floats(-1, 2)
    | st.sampled_from(("fedavg", "fednova(", "median+server_adam", "iid", "dirichlet", "mlp", "sgd", "auto", "krum")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from((*TEXTS, "name", "kind", "options")), inner, max_size=3)
    ),
    max_leaves=4,
)
"""Anything that TOML or JSON can hold."""


def set_key(settings: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Give a key of nested settings another value."""
    key, *rest = path
    inner = settings.get(key)
    return {**settings, key: set_key(inner, tuple(rest), value) if rest and isinstance(inner, dict) else value}


def changed_settings(known: dict[str, Any], *more: str) -> st.SearchStrategy[list[Damage]]:
    """Other values for keys of these settings and of all sections within, for `more` keys, and for any."""
    paths = [*_paths(known), *((key,) for key in (*more, *TEXTS))]
    return several(damage(set_key, path=st.sampled_from(paths), value=VALUES))


def _paths(settings: dict[str, Any]) -> list[tuple[str, ...]]:
    below = [(key, *path) for key, value in settings.items() if isinstance(value, dict) for path in _paths(value)]
    return [(key,) for key in settings] + below
