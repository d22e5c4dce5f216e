"""Runs checks one after the other: what one found, or why it failed, as a row. It wants no test framework."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.gpu.checks import Check

__all__ = ["exact_float32", "run_check"]


def run_check(check: Check, device: torch.device) -> dict[str, Any]:
    """A row with the difference and a verdict, ``"ok"`` or ``"failed"``; whatever a check raises is its reason."""
    started = time.perf_counter()
    row: dict[str, Any] = {"check": check.name, "tolerance": check.tolerance}
    try:
        with exact_float32():
            found = check.difference(device)
        row |= {"difference": found, "verdict": "ok" if found <= check.tolerance else "failed"}
    except Exception as error:
        first = error.__cause__ or error
        where = traceback.extract_tb(first.__traceback__)
        ours = [f"{one.filename}:{one.lineno}" for one in where if "fedmerge" in Path(one.filename).parts]
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        row |= {"verdict": "failed", "reason": reason, "where": ours[-1:]}
    return {**row, "seconds": round(time.perf_counter() - started, 3)}


@contextmanager
def exact_float32() -> Iterator[None]:
    """Products of float32 as float32, where a GPU would round their factors to ten bits (TF32)."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
