"""What a comparison with personal parts cannot do, for no model is whole without a client's own part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fedmerge.errors import ConfigError
from fedmerge.layout import Layout
from fedmerge.simulation.runs.config_model import Config

__all__ = ["check_personal", "check_personal_parts"]


def check_personal(config: Config) -> None:
    """Check a configuration by itself.

    Raises
    ------
    ConfigError
        Something is asked of clients' models that needs all of their tensors.
    """
    if not config.personal:
        if config.training.personal_epochs:
            raise ConfigError("training.personal_epochs trains the personal part first: name its tensors in personal")
        return
    if config.references:
        raise ConfigError("references judge clients' models by what they send, without what is personal: leave one out")
    if not config.evaluate_clients or config.privacy.withholds_metrics:
        told = "privacy keeps their judgements back" if config.evaluate_clients else "evaluate_clients is false"
        raise ConfigError(f"with personal parts only clients can judge a model, and {told}: leave one out")


def check_personal_parts(model: nn.Module, personal: Sequence[str], held_out: Sequence[Any]) -> None:
    """Check the patterns, and that clients hold examples to judge their models on, given those of each.

    Raises
    ------
    ConfigError
        No client holds any.
    UnknownName, InvalidOption
        A pattern is the name of no tensor, or nothing is left to merge.
    """
    if not personal:
        return
    if not any(len(rows) for rows in held_out):
        raise ConfigError("with personal parts clients judge their own models: set partition.held_out, say to 0.1")
    Layout.of_module(model, personal)
