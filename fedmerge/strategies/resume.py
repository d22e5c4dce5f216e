"""Checkpoints of a strategy of ours, and going on from them: wherever the rounds run, deployments included."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from torch import Tensor

from fedmerge.errors import InvalidOption, RecordError
from fedmerge.merging import Pipeline
from fedmerge.records.atomic_files import append_line, read_toml, write_toml
from fedmerge.records.checkpoints import Checkpoint, newest_checkpoint, save_checkpoint
from fedmerge.records.locks import LOCK, held
from fedmerge.state import State
from fedmerge.strategies.identity import Identities
from fedmerge.wire.record_values import to_arrays, view_arrays

__all__ = ["Past", "StrategyCheckpoints", "warn_of_lost_memory"]

log = logging.getLogger("fedmerge")


@dataclass(frozen=True)
class Past:
    """What the newest checkpoint tells of a run: its last round, model, memory and nodes, and how far it is to go."""

    round: int
    arrays: ArrayRecord
    memory: dict[str, Tensor]
    identities: Identities
    num_rounds: int


@dataclass(frozen=True)
class StrategyCheckpoints:
    """A folder in which a strategy leaves its model and memory after every merge.

    Parameters
    ----------
    folder
        Where; one folder serves one run, and is locked while it runs.
    keep
        How many of the last ones stay.

    Raises
    ------
    InvalidOption
        `keep` is less than one.
    """

    folder: Path
    keep: int = 3

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise InvalidOption(f"keep_checkpoints must be at least 1, got {self.keep}")

    def save(
        self, round: int, arrays: ArrayRecord, memory: State, identities: Identities, settings: Mapping[str, Any]
    ) -> None:
        """Keep the model that was merged in `round`, what the method remembers, who is who, and the settings."""
        sections = {"state": view_arrays(arrays), "memory": memory}
        facts = {"strategy": dict(settings), "nodes": identities.facts()}
        save_checkpoint(self.folder, Checkpoint(round, sections, facts), keep=self.keep)

    def charge(self, round: int, questions: int) -> None:
        """Write down what clients are about to be asked: a round that is interrupted, and run again, costs twice."""
        self.folder.mkdir(parents=True, exist_ok=True)
        append_line(self._bill, json.dumps({"round": round, "questions": questions}).encode())

    def charged(self) -> int:
        """All that was ever written down."""
        lines = self._bill.read_text().splitlines() if self._bill.exists() else []
        return sum(map(_questions, lines))

    @property
    def _bill(self) -> Path:
        return self.folder / "answers.jsonl"

    def stop(self, reason: str) -> None:
        """Leave word that an observer has ended the run, so that it does not go on when it is started again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_toml(self._stopped, {"stopped": reason})

    def _ended(self, watched: bool) -> str | None:
        """Why observers have ended the run before; nothing where none watch it any more."""
        if not self._stopped.exists():
            return None
        if watched:
            return str(read_toml(self._stopped).get("stopped"))
        self._stopped.unlink()
        return None

    @property
    def _stopped(self) -> Path:
        return self.folder / "stopped.toml"

    def locked(self) -> AbstractContextManager[None]:
        """Hold the folder while a run leaves its checkpoints there.

        Raises
        ------
        FolderInUse
            Another run, in this process or another, holds it.
        """
        return held(self.folder / LOCK, self.folder)

    def past(self, settings: Mapping[str, Any], initial: ArrayRecord, num_rounds: int, *, watched: bool) -> Past | None:
        """What to go on from: the newest checkpoint, None where there is none.

        Parameters
        ----------
        settings
            All that must not change between the rounds of one run.
        initial, num_rounds
            The model that the run would start from, and the number of its last round.
        watched
            Whether observers watch it, so that a run that one of them has ended stays so.

        Raises
        ------
        RecordError
            None of the checkpoints can be used, or they are of other settings or another model.
        """
        checkpoint = newest_checkpoint(self.folder)
        if checkpoint is None:
            return None
        self._check(checkpoint, settings, initial)
        done, ended = checkpoint.round, self._ended(watched)
        if ended is not None:
            log.warning("the run in %s was ended after round %d: %s. It goes on where nobody watches it",
                        self.folder, done, ended)  # fmt: skip
        elif done >= num_rounds:
            log.warning(
                "all %d rounds are in %s: nothing is left to run; for a new run choose another checkpoint_dir",
                num_rounds, self.folder,
            )  # fmt: skip
        else:
            log.info("continuing after round %d of %d, from %s", done, num_rounds, self.folder)
        return Past(
            done,
            to_arrays(checkpoint.section("state")),
            dict(checkpoint.section("memory")),
            Identities.of_facts(checkpoint.facts.get("nodes")),
            num_rounds if ended is None else done,
        )

    def _check(self, checkpoint: Checkpoint, settings: Mapping[str, Any], initial: ArrayRecord) -> None:
        known = checkpoint.facts.get("strategy", {})
        other = sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key))
        if other:
            told = "; ".join(f"{key} was {known.get(key)}, is {settings.get(key)}" for key in other)
            raise RecordError(
                f"{self.folder} holds checkpoints of another configuration ({told}): "
                "go on with the settings of before, or choose another checkpoint_dir"
            )
        if set(initial) != set(checkpoint.section("state")):
            raise RecordError(
                f"{self.folder} holds checkpoints of another model, whose tensors have other names: "
                "choose another checkpoint_dir"
            )


def _questions(line: str) -> int:
    """Of a line of the bill; one cut short at a power cut was never asked."""
    try:
        return int(json.loads(line)["questions"])
    except (LookupError, TypeError, ValueError):
        return 0


def warn_of_lost_memory(pipeline: Pipeline, *, personal: bool) -> None:
    """Tell what becomes of clients that lost what they kept while the server was away."""
    if personal:
        log.warning("clients that lost what they kept go on with personal parts as model_fn makes them")
    if pipeline.batch_norm == "local":
        log.warning("clients that lost what they kept go on with the batch-norm statistics of the model sent")
    rule = pipeline.aggregator.local_rule
    if rule is not None and rule.keeps:
        log.warning("clients that lost what they kept for local rule %s begin at zeros", rule.name)
