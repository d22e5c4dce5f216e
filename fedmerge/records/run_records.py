"""The record of one run on disk: its configuration, a row per round, checkpoints to go on from."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from fedmerge.errors import RecordError
from fedmerge.plain_text import cut_within
from fedmerge.records.atomic_files import (
    append_line,
    flush_folder,
    pack_tensors,
    read_toml,
    write_atomically,
    write_tensors,
    write_toml,
    writing,
)
from fedmerge.records.checkpoints import Checkpoint, newest_checkpoint, save_checkpoint
from fedmerge.state import State

__all__ = [
    "PARTIAL",
    "RunRecord",
    "comparable",
    "continuing",
    "differing",
    "differing_federation",
    "lock_of",
    "read_checkpoint",
    "read_toml",
    "write_atomically",
    "write_tensors",
    "write_toml",
]

log = logging.getLogger("fedmerge")

PARTIAL = ".partial"
"""Ending of the folder of a run that has not finished."""

# These change how a run is done, or whether it goes on, not what comes out, so a record may differ in them.
_HOW = ("workers", "threads", "engine", "keep_checkpoints", "on_client_error", "on_too_few", "target", "observers")

# Runs of one comparison differ in these.
_RUN = ("methods", "options", "seeds", "rounds")


def comparable(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Settings as flat ``a.b`` keys without nulls, and without those that do not change the result.

    Examples
    --------
    >>> comparable({"rounds": 2, "workers": 3, "training": {"epochs": 1, "steps": None}})
    {'rounds': 2, 'training.epochs': 1}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= comparable(value, f"{path}{key}.")
        elif value is not None and path + key not in _HOW:
            flat[path + key] = list(value) if isinstance(value, tuple) else value
    return flat


def differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys in which two configurations would give different results."""
    a, b = comparable(first), comparable(other)
    return sorted(key for key in {*a, *b} if a.get(key) != b.get(key))


def differing_federation(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys that keep two runs from being compared: everything but method, options, seed and rounds."""
    return [key for key in differing(first, other) if key.partition(".")[0] not in _RUN]


def continuing(done: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Keys that keep a run from going on as `wanted`: all that differ, but for rounds where more are wanted.

    Examples
    --------
    >>> continuing({"rounds": 5, "seeds": [0]}, {"rounds": 8, "seeds": [0]})
    []
    """
    before, after = done.get("rounds"), wanted.get("rounds")
    longer = isinstance(before, int) and isinstance(after, int) and before <= after
    return [key for key in differing(done, wanted) if not (key == "rounds" and longer)]


def lock_of(folder: Path) -> Path:
    """The lock on a record: beside it, for its own folder gets another name when it is complete."""
    return folder.with_name(folder.name + ".lock")


class RunRecord:
    """The folder of one run while it is written: ``<folder>.partial`` until it is complete.

    Parameters
    ----------
    folder
        Where the complete record will stand.
    config
        Everything resolved; running it again gives the same record.
    keep_checkpoints
        How many of the last checkpoints stay.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, keep_checkpoints: int = 3) -> None:
        self._describe(folder, config, keep_checkpoints)
        with writing(self.partial):
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)
        write_toml(self.partial / "config.toml", config)

    def _describe(self, folder: Path, config: Mapping[str, Any], keep: int) -> None:
        self.folder, self._config, self._keep = folder, config, keep
        self.partial = folder.with_name(folder.name + PARTIAL)
        self._position = 0

    @classmethod
    def reopen(
        cls, folder: Path, config: Mapping[str, Any], *, keep_checkpoints: int = 3
    ) -> tuple[Self, Checkpoint | None]:
        """Take up a run that was interrupted, or wants more rounds: rows beyond its last whole checkpoint are dropped.

        Returns
        -------
        tuple
            The record, and the checkpoint to go on from; None where the run was interrupted before its first one,
            and the record is as new.

        Raises
        ------
        RecordError
            No checkpoint can be used, or the configuration is not that of the checkpoint.
        """
        record = cls.__new__(cls)
        record._describe(folder, config, keep_checkpoints)
        checkpoint = newest_checkpoint(record.partial / "checkpoint", record._rows_fault)
        if checkpoint is None:
            return cls(folder, config, keep_checkpoints=keep_checkpoints), None
        begun = checkpoint.facts.get("config")
        if not isinstance(begun, dict):
            raise RecordError(
                f"{record.partial} has a checkpoint that is not of a run: delete the folder to start again"
            )
        other = continuing(begun, config)
        if other:
            raise RecordError(
                f"{record.partial} was saved under another configuration (it differs in {', '.join(other)}): "
                "restore its config.toml, or delete the folder to start again"
            )
        write_toml(record.partial / "config.toml", config)
        record._position = int(checkpoint.facts.get("position", 0))
        with writing(record._rows), record._rows.open("r+b") as file:
            file.truncate(record._position)
        return record, checkpoint

    @property
    def _rows(self) -> Path:
        return self.partial / "rounds.jsonl"

    def _rows_fault(self, checkpoint: Checkpoint) -> str | None:
        """What is wrong with the rows that a checkpoint counts on."""
        position = checkpoint.facts.get("position", 0)
        if isinstance(position, bool) or not isinstance(position, int) or position < 0:
            return "it does not tell which rows were written before it"
        rows = self._rows.read_bytes() if self._rows.exists() else b""
        if len(rows) < position or (position and rows[position - 1 : position] != b"\n"):
            return f"{self._rows} lacks rows that were written before it"
        return None

    def write_partition(self, tensors: State) -> None:
        """Keep who held which examples."""
        write_tensors(self.partial / "partition.safetensors", tensors)

    def has_partition(self, tensors: State) -> bool:
        """Whether this is who held which examples when the run was begun."""
        path = self.partial / "partition.safetensors"
        return path.exists() and path.read_bytes() == pack_tensors(tensors)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one round to ``rounds.jsonl``, as a whole line: NaN and infinity become null, long texts are cut."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        clean = cut_within(clean)
        self._position = append_line(self._rows, json.dumps(clean, allow_nan=False).encode())

    def rows(self) -> list[dict[str, Any]]:
        """What was written so far, by an earlier process too."""
        return [json.loads(line) for line in self._rows.read_bytes().splitlines()] if self._rows.exists() else []

    def checkpoint(
        self,
        round: int,
        state: State,
        memory: State,
        *,
        sections: Mapping[str, State] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the global model, the method's memory and whatever else going on after `round` takes."""
        whole = {"config": comparable(self._config), "position": self._position, **(facts or {})}
        parts = {"state": state, "memory": memory, **(sections or {})}
        save_checkpoint(self.partial / "checkpoint", Checkpoint(round, parts, whole), keep=self._keep)

    def note_environment(self, facts: Mapping[str, Any]) -> None:
        """Add who writes from here on to ``environment.toml``: a table for each time that the run was taken up."""
        path = self.partial / "environment.toml"
        before = read_toml(path).get("sessions", []) if path.exists() else []
        write_toml(path, {"sessions": [*before, dict(facts)]})

    def finish(self) -> Path:
        """Put the complete record in its place; a record that stood there gives way only now."""
        old = self.folder.with_name(self.folder.name + ".old")
        with writing(self.folder):
            if self.folder.exists():
                if old.exists():  # somebody was interrupted right here
                    shutil.rmtree(old)
                self.folder.rename(old)
            self.partial.rename(self.folder)
            flush_folder(self.folder.parent)
            if old.exists():
                shutil.rmtree(old)
        return self.folder


def read_checkpoint(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """Round, global model and method memory of a run's last checkpoint that is whole.

    Raises
    ------
    RecordError
        There is none.
    """
    checkpoint = newest_checkpoint(folder / "checkpoint")
    if checkpoint is None:
        raise RecordError(f"no usable checkpoint in {folder / 'checkpoint'}: there is none")
    return checkpoint.round, dict(checkpoint.section("state")), dict(checkpoint.section("memory"))
