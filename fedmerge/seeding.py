"""Random streams by purpose, and the batches drawn from one: nothing in fedmerge draws from a global generator."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import count, islice

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.errors import InvalidOption

__all__ = ["batch_indices", "generator", "integer_seed", "torch_generator"]


def _sequence(seed: int, purpose: str, *key: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()), *key))


def generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """An independent NumPy generator for one purpose, and within it for one key (client, round, ...).

    Examples
    --------
    >>> a, b = generator(0, "batches", 3, 1), generator(0, "batches", 3, 1)
    >>> bool((a.permutation(9) == b.permutation(9)).all())
    True
    """
    return np.random.default_rng(_sequence(seed, purpose, *key))


def integer_seed(seed: int, purpose: str, *key: int) -> int:
    """A 63-bit seed for libraries that take an integer."""
    return int(_sequence(seed, purpose, *key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(seed: int, purpose: str, *key: int) -> torch.Generator:
    """The same as :func:`generator`, for torch on the CPU."""
    return torch.Generator().manual_seed(integer_seed(seed, purpose, *key))


def batch_indices(
    n: int,
    batch_size: int,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    generator: np.random.Generator,
) -> Iterator[NDArray[np.int64]]:
    """Draw the batches of a number of epochs, or of a number of steps.

    Each epoch is a fresh permutation of the `n` examples; its last batch may be smaller.

    Parameters
    ----------
    n : int
        Number of examples, at least 1.
    batch_size : int
        Examples in a batch, at least 1.
    epochs, steps : int, optional
        Exactly one of them: passes over the examples, or batches in all (over as many epochs as that takes).
    generator : numpy.random.Generator
        Source of the permutations, advanced as batches are drawn.

    Yields
    ------
    numpy.ndarray
        int64 `[b]` with `1 <= b <= batch_size`: positions among the `n` examples.

    Raises
    ------
    InvalidOption
        At the call, where a number is out of range, or both or none of `epochs` and `steps` are given.

    Examples
    --------
    >>> batches = batch_indices(5, 2, epochs=1, generator=np.random.default_rng(0))
    >>> [len(batch) for batch in batches]
    [2, 2, 1]
    """
    if n < 1:
        raise InvalidOption(f"n={n}: there are no examples to draw batches from. Give at least 1.")
    if batch_size < 1:
        raise InvalidOption(f"batch_size={batch_size}: must be at least 1.")
    if (epochs is None) == (steps is None):
        raise InvalidOption(f"epochs={epochs} and steps={steps}: give exactly one of them.")
    if min(epochs or 0, steps or 0) < 0:
        raise InvalidOption(f"epochs={epochs}, steps={steps}: must not be negative.")
    passes = count() if epochs is None else range(epochs)
    # Lazy, so that a generator shared with other draws advances batch by batch.
    batches = (
        order[start : start + batch_size]
        for order in (generator.permutation(n) for _ in passes)
        for start in range(0, n, batch_size)
    )
    return islice(batches, steps)
