"""Synthetic run records: what a comparison writes, without training anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

WriteRun = Callable[..., Path]


def make_row(method: str, seed: int, number: int, accuracy: float | None, **changes: Any) -> dict[str, Any]:
    trained = number > 0
    row = {
        "method": method,
        "seed": seed,
        "round": number,
        "test_loss": None if accuracy is None else 1 - accuracy,
        "test_accuracy": accuracy,
        "train_loss": 0.5 if trained else None,
        "clients_ok": 4,
        "clients_failed": 0,
        "bytes_down": 2_000_000 * trained,
        "bytes_up": 1_000_000 * trained,
        "seconds_train": 3.0 * trained,
        "seconds_merge": 0.5 * trained,
        "seconds_evaluate": 0.25 * trained,
        "parameters": 1000,
    }
    return {**row, **changes}


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Write one run below tmp_path/OUT, a row per accuracy, `changes` in each row; returns its folder."""

    def write(method: str, seed: int, accuracies: Sequence[float | None], out: str = "OUT", **changes: Any) -> Path:
        folder = tmp_path / out / f"{method}-seed{seed}"
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text("")
        rows = [make_row(method, seed, number, value, **changes) for number, value in enumerate(accuracies)]
        (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "OUT"
