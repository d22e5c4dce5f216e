"""Training by a function of one's own, with our batches, seeds, rules and records around it.

``train_fn(model, batches, settings)`` trains `model` in place and returns a :class:`TrainingReport`, or a mapping with
its fields::

    def train_fn(model, batches, settings):
        optimizer = torch.optim.SGD(model.parameters(), settings.learning_rate)
        total = 0.0
        for x, y in batches:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            batches.correct(model)      # what the method adds to gradients
            optimizer.step()
            total += loss.item()
        return {"steps": len(batches), "loss": total / len(batches), "learning_rate": settings.learning_rate}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fedmerge.data.example_sets import Examples
from fedmerge.errors import ConfigError, InvalidOption, shown
from fedmerge.lookup.loading import load_named
from fedmerge.seeding import generator
from fedmerge.training.correction import Correction, correct
from fedmerge.training.local_training import LocalTraining
from fedmerge.training.model_on_data import moved, training_mode
from fedmerge.training.report import TrainingReport

__all__ = ["RoundBatches", "train_by_function"]

_FIELDS = frozenset(field.name for field in dataclasses.fields(TrainingReport))


class RoundBatches:
    """One client's batches of one round: iterating gives them all, and again the same.

    They are those that local training would draw: ``epochs`` passes, or so many batches as make ``steps`` steps; of
    ``batch_size`` each. Its length is their number.

    Attributes
    ----------
    client, round, seed : int
        Name the client's random streams, for draws of one's own.
    held_out : Examples, or None
        What the client does not train on: ``held_out.in_order(batch_size)`` gives its batches.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Examples,
        settings: LocalTraining,
        correction: Correction,
        held_out: Examples | None,
        *,
        seed: int,
        client: int,
        round: int,
    ) -> None:
        self.seed, self.client, self.round, self.held_out = seed, client, round, held_out
        self._data, self._settings = data, settings
        self._correction = dataclasses.replace(correction, pull=correction.pull + settings.proximal_mu)
        self._device = next(model.parameters()).device
        pull = self._correction.pull
        self._start = {name: p.detach().clone() for name, p in model.named_parameters()} if pull else {}
        self._corrected = False

    def __len__(self) -> int:
        epochs, steps = self._settings.length
        each = -(-len(self._data) // self._settings.batch_size)
        return epochs * each if epochs is not None else (steps or 0) * self._settings.accumulate

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and labels, on the model's device."""
        draws = generator(self.seed, "batches", self.client, self.round)
        for batch in self._data.drawn(self._settings.batch_size, steps=len(self), generator=draws):
            yield moved(batch, self._device)

    def correct(self, model: nn.Module) -> None:
        """Add to the gradients of `model` what the method and ``proximal_mu`` ask for, in place, before a step."""
        self._corrected = True
        if not self._correction:
            return
        named = dict(model.named_parameters())
        gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
        weights = {name: p.detach() for name, p in named.items()}
        correct(gradients, weights, self._start, self._correction.pull, self._correction.offset)

    def check_corrected(self) -> None:
        """Make sure that what the method asks for was not left out.

        Raises
        ------
        InvalidOption
            It was.
        """
        if self._correction and not self._corrected:
            raise InvalidOption(
                "the method or training.proximal_mu changes gradients, and the training function did not let it: call "
                "batches.correct(model) after every backward()"
            )


def train_by_function(model: nn.Module, settings: LocalTraining, batches: RoundBatches) -> TrainingReport:
    """Train `model` in place by ``settings.train_fn``.

    Raises
    ------
    ConfigError
        The function cannot be imported.
    InvalidOption
        It does not return a report, or left out what the method asks for.
    """
    function: Any = settings.train_fn
    if isinstance(function, str):
        function = load_named(function, "training function", "function", "my_training:train", ConfigError)
    training_mode(model, settings.frozen_mode)
    returned = function(model, batches, settings)
    batches.check_corrected()
    report = _report(returned, batches.client)
    if not (_is_number(report.steps) and report.steps >= 1 and _is_number(report.loss)):
        raise InvalidOption(f"client {batches.client}: a training function must report steps >= 1 and a loss: {report}")
    return report


def _report(returned: object, client: int) -> TrainingReport:
    if isinstance(returned, TrainingReport):
        return returned
    if isinstance(returned, Mapping) and {"steps", "loss"} <= set(returned) <= _FIELDS:
        return TrainingReport(**returned)
    raise InvalidOption(
        f"client {client}: a training function returns a TrainingReport, or a mapping with steps, loss and, for "
        f"methods that go by it, {', '.join(sorted(_FIELDS - {'steps', 'loss'}))}; got {shown(returned)}"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
