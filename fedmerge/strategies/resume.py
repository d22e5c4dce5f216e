"""Checkpoints of a strategy of ours, and going on from them: wherever the rounds run, deployments included."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Result

from fedmerge.errors import InvalidOption, RecordError
from fedmerge.records.atomic_files import append_line, read_toml, write_toml
from fedmerge.records.checkpoints import Checkpoint, newest_checkpoint, save_checkpoint
from fedmerge.records.locks import LOCK, held
from fedmerge.strategies.identity import Identities
from fedmerge.strategies.numbering import start_after
from fedmerge.wire.flower_records import to_arrays, view_arrays

if TYPE_CHECKING:
    from fedmerge.strategies.merge_strategy import MergeStrategy

__all__ = ["StrategyCheckpoints"]

log = logging.getLogger("fedmerge")


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

    def save(self, strategy: MergeStrategy, round: int, arrays: ArrayRecord) -> None:
        """Keep the model that `strategy` merged in `round`, and what it remembers."""
        sections = {"state": view_arrays(arrays), "memory": strategy.memory}
        facts = {"strategy": _settings(strategy), "nodes": strategy.identities.facts()}
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

    def _ended(self, strategy: MergeStrategy) -> str | None:
        """Why observers have ended the run before; nothing where none watch it any more."""
        if not self._stopped.exists():
            return None
        if strategy.observers:
            return str(read_toml(self._stopped).get("stopped"))
        self._stopped.unlink()
        return None

    @property
    def _stopped(self) -> Path:
        return self.folder / "stopped.toml"

    def start(self, strategy: MergeStrategy, start: Callable[..., Result], **given: Any) -> Result:
        """Call `start` with the keywords `given`, from the newest checkpoint if there is one.

        Raises
        ------
        RecordError
            None of the checkpoints can be used, or they are of other settings or another model.
        FolderInUse
            Another run, in this process or another, leaves its checkpoints there.
        """
        with held(self.folder / LOCK, self.folder):
            return self._start_locked(strategy, start, given)

    def _start_locked(self, strategy: MergeStrategy, start: Callable[..., Result], given: Mapping[str, Any]) -> Result:
        checkpoint, strategy.answers = newest_checkpoint(self.folder), self.charged()
        if checkpoint is None:
            return start(**given)
        self._check(checkpoint, _settings(strategy), given["initial_arrays"])
        done, wanted, ended = checkpoint.round, given["num_rounds"], self._ended(strategy)
        if ended is not None:
            given = {**given, "num_rounds": done}
            log.warning("the run in %s was ended after round %d: %s. It goes on where nobody watches it",
                        self.folder, done, ended)  # fmt: skip
        elif done >= wanted:
            log.warning(
                "all %d rounds are in %s: nothing is left to run; for a new run choose another checkpoint_dir",
                wanted, self.folder,
            )  # fmt: skip
        else:
            log.info("continuing after round %d of %d, from %s", done, wanted, self.folder)
        if strategy.travel.personal:
            log.warning("clients that lost what they kept go on with personal parts as model_fn makes them")
        if strategy.pipeline.batch_norm == "local":
            log.warning("clients that lost what they kept go on with the batch-norm statistics of the model sent")
        rule = strategy.pipeline.aggregator.local_rule
        if rule is not None and rule.keeps:
            log.warning("clients that lost what they kept for local rule %s begin at zeros", rule.name)
        strategy.memory = dict(checkpoint.section("memory"))
        strategy.identities = Identities.of_facts(checkpoint.facts.get("nodes"))
        given = {**given, "initial_arrays": to_arrays(checkpoint.section("state"))}
        # The server may have died between the merge, which is saved, and the test of its model.
        return start_after(done, strategy, start, evaluate_again=True, **given)

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


def _settings(strategy: MergeStrategy) -> dict[str, Any]:
    """All that must not change between the rounds of one run, as JSON can hold it."""
    numbers = (
        "fraction_train",
        "fraction_evaluate",
        "min_train_nodes",
        "min_available_nodes",
        "weighted_by_key",
        "seed",
    )
    told = {"method": repr(strategy.pipeline), **{name: getattr(strategy, name) for name in numbers}}
    return told | strategy.travel.settings()
