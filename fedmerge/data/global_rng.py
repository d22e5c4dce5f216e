"""Keep other people's code from disturbing the global random generators of the caller."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["untouched_global_rng"]


@contextmanager
def untouched_global_rng() -> Iterator[None]:
    """Restore the global states of `random`, numpy and torch (CPU) on leaving the block.

    Examples
    --------
    >>> before = random.getstate()
    >>> with untouched_global_rng():
    ...     _ = random.random()
    >>> before == random.getstate()
    True
    """
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(cpu)
