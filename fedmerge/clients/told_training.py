"""What a message's configuration says about how clients train."""

from __future__ import annotations

import dataclasses
from typing import Any

from flwr.app import ConfigRecord

from fedmerge.errors import ConfigError, InvalidOption, UnknownName
from fedmerge.training.local_training import USUAL_NAMES, LocalTraining

__all__ = ["ELSEWHERE", "told_training"]

_FIELDS = tuple(field.name for field in dataclasses.fields(LocalTraining))
# Entries of a train message that are not about training: read elsewhere.
ELSEWHERE = frozenset(
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
            if alone and name not in ELSEWHERE:
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
