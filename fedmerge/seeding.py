"""Random streams by purpose: nothing in fedmerge draws from a global generator."""

from __future__ import annotations

import zlib

import numpy as np
import torch

__all__ = ["generator", "integer_seed", "torch_generator"]


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
