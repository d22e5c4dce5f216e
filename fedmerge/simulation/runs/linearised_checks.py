"""Comparisons whose clients train in the tangent space: by the configuration, or by an edit of one of its methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedmerge.edits.edit import Edit
from fedmerge.errors import ConfigError, ModelError
from fedmerge.inputs import call, tensors_of
from fedmerge.lookup.method_names import own_parts
from fedmerge.merging import build_pipeline, divided, method_parts, parts_beside
from fedmerge.merging.tangent_check import check_linearised
from fedmerge.models.tangent import is_linearised
from fedmerge.simulation.runs.config_model import Config
from fedmerge.tasks import Task

__all__ = ["check_differentiable", "check_linearised_methods", "linearised_by"]


def linearised_by(config: Config, method: str) -> tuple[str, ...]:
    """Patterns of the parameters in which the clients of a method train the model's linearisation.

    Raises
    ------
    ConfigError
        The method's edit and the configuration name others.
    """
    own = tuple(config.training.linearised)
    edits, _, others = divided(method_parts(method, config.options), method)
    made: tuple[Edit, ...] = parts_beside(edits, others, method)["edit"] if edits else ()
    for edit in made:
        asked = edit.linearises
        if asked and own not in ((), asked):
            raise ConfigError(
                f"training.linearised = {list(own)}, and {method} linearises {list(asked)}: leave one of them out"
            )
        own = asked or own
    return own


def check_linearised_methods(config: Config) -> None:
    """Check the settings of a configuration that linearises its model, by themselves.

    Raises
    ------
    ConfigError
        Clients start apart, so that there is no one point to expand the model around; or two settings contradict.
    InvalidOption
        A method does not go with a linearised model.
    """
    for method in config.methods:
        # Parts of one's own are not imported by reading a configuration; they are looked at when the run is made.
        own = bool(own_parts(method))
        patterns = tuple(config.training.linearised) if own else linearised_by(config, method)
        if not patterns:
            continue
        for setting in ("apart", "variants"):
            if getattr(config.model, setting):
                raise ConfigError(
                    f"{method} with a linearised model expands it around what all clients start from, and "
                    f"model.{setting} has them start apart: leave one out"
                )
        if not own:
            check_linearised(build_pipeline(method, config.options, batch_norm=config.batch_norm))


def check_differentiable(make_model: Callable[[], nn.Module], x: Any, task: Task | None = None) -> None:
    """Make sure that a model, where it is linearised, can be trained, by one pass forward and back on a few examples.

    Raises
    ------
    ModelError
        A part of it has no derivative of its derivative.
    """
    model = make_model()
    if not is_linearised(model):
        return
    try:
        outputs = call(model, x) if task is None else task.forward(model, x)
        sums = [o.sum() for o in tensors_of(outputs) if o.is_floating_point() and o.requires_grad]
        torch.autograd.grad(sums, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ModelError(
            f"a part of the model cannot be trained linearised ({reason}): replace it, or name other parameters in "
            "training.linearised, such as those behind it"
        ) from error
