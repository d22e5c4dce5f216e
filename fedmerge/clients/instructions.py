"""What an order tells clients besides the model: how to train, which batches to draw, what to keep and to send."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flwr.app import ConfigRecord

from fedmerge.errors import ConfigError, InvalidOption, UnknownName
from fedmerge.training.local_training import USUAL_NAMES, LocalTraining
from fedmerge.training.rules.local_rule import LocalRule, rule_of
from fedmerge.wire.flower_records import WITHHOLD_KEY, integer, strings
from fedmerge.wire.keys import KEEP_KEY

__all__ = ["Instructions", "told_training"]

_FIELDS = tuple(field.name for field in dataclasses.fields(LocalTraining))
_STAGES = 1 << 20  # more than there are rounds

# Entries of a train message that are not about training: read elsewhere.
_ELSEWHERE = frozenset(
    {
        "server_round",
        "seed",
        "stage",
        "needs",
        "needs_settings",
        "statistics_compression",
        "statistics_budget",
        "batch_norm",
        "keep_model",
        "frozen",
        "send",
        "exchange",
        "withhold_metrics",
        "local_rule",
        "local_rule_settings",
        "personal",
        "frozen_fingerprint",
        "frozen_names",
        "missed_replies",
    }
)


@dataclass(frozen=True, eq=False)
class Instructions:
    """The configuration of an order to train, read once.

    Parameters
    ----------
    config
        As it came; what clients measure is read from it where they measure.
    training
        How to train in this round.
    rule
        What the method changes in training, if anything.
    seed, round
        Name the random streams of batches, with the client's number. Stages of one round draw apart.
    server_round, stage
        Where in the run this order is: the stage is 0 for the first exchange of a round.
    frozen
        Names of parameters that are not trained this time.
    wanted
        Names of the tensors that a later stage sends back; the first sends all.
    """

    config: ConfigRecord
    training: LocalTraining
    rule: LocalRule | None
    seed: int
    round: int
    server_round: int
    stage: int
    frozen: tuple[str, ...]
    wanted: tuple[str, ...]

    @classmethod
    def read(cls, config: ConfigRecord, training: LocalTraining, *, alone: bool = True) -> Instructions:
        """Read the configuration of a message or of a cohort's order.

        Parameters
        ----------
        config
            What came.
        training
            How to train where it says nothing.
        alone
            Whether nobody else reads it, see :func:`told_training`.

        Raises
        ------
        UnknownName, ConfigError, InvalidOption
            It cannot be read.
        """
        server_round, stage = integer(config, "server-round"), integer(config, "stage")
        training = told_training(training, config, alone=alone).in_round(server_round)
        rule = rule_of(config)
        if rule is not None:
            rule.check(training)
        return cls(
            config=config,
            training=training,
            rule=rule,
            seed=integer(config, "seed"),
            round=server_round + stage * _STAGES,
            server_round=server_round,
            stage=stage,
            frozen=tuple(strings(config, "frozen")),
            wanted=tuple(strings(config, "send")),
        )

    @cached_property
    def keeps_buffers(self) -> bool:
        """Whether batch norms stay with the client."""
        return self.config.get("batch-norm") == "local"

    @cached_property
    def keeps_model(self) -> bool:
        """Whether the client keeps its model until the next order."""
        return bool(self.config.get(KEEP_KEY))

    @cached_property
    def withholds(self) -> bool:
        """Whether the client keeps its training loss to itself."""
        return bool(self.config.get(WITHHOLD_KEY))

    @cached_property
    def measures(self) -> bool:
        """Whether the client is asked for statistics."""
        return bool(strings(self.config, "needs"))


def told_training(training: LocalTraining, config: ConfigRecord, *, alone: bool = True) -> LocalTraining:
    """`training` with what a message's configuration sets; ``-`` stands for ``_``, ``lr`` for ``learning-rate``.

    Parameters
    ----------
    training
        What holds where the message says nothing.
    config
        The message's configuration.
    alone
        Whether nobody else reads it: then an entry that is not known here is read by nobody.

    Raises
    ------
    UnknownName
        An entry that nobody reads.
    ConfigError
        Two entries that contradict each other, or one that names code to import.
    InvalidOption
        A value of the wrong type or out of range.

    Examples
    --------
    >>> told_training(LocalTraining(), ConfigRecord({"lr": 0.5, "local-epochs": 3})).epochs
    3
    """
    changes: dict[str, Any] = {}
    told: dict[str, str] = {}
    for key, value in config.items():
        name = key.replace("-", "_")
        name = USUAL_NAMES.get(name, name)
        if name not in _FIELDS:
            if alone and name not in _ELSEWHERE:
                known = [field.replace("_", "-") for field in (*_FIELDS, *USUAL_NAMES) if field != "train_fn"]
                raise UnknownName("setting in the configuration of a train message", key, known)
            continue
        if name == "train_fn" or (name in ("schedule", "step_schedule") and ":" in str(value)):
            raise ConfigError(
                f"the message sets {key} = {value!r}: a server may not have clients import code; set it as "
                f"LocalTraining({name}=...) where the client is made"
            )
        if name in changes and changes[name] != value:
            raise ConfigError(f"the message says {told[name]} = {changes[name]!r} and {key} = {value!r}: leave one out")
        changes[name], told[name] = value, key
    if not changes:
        return training
    # A number of epochs and one of steps contradict each other.
    for name, other in (("epochs", "steps"), ("steps", "epochs")):
        if name in changes:
            changes.setdefault(other, None)
    try:
        return dataclasses.replace(training, **changes)
    except TypeError as error:
        raise InvalidOption(f"the message's training settings {changes} have a wrong type: {error}") from error
