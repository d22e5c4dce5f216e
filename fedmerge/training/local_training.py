"""How a client trains: the settings, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from fedmerge.errors import InvalidOption
from fedmerge.layout import FrozenMode, check_patterns
from fedmerge.lookup.keyword_check import tell_keywords
from fedmerge.lookup.method_names import parse_method
from fedmerge.models.tangent import linearise
from fedmerge.training.optimizers import (
    check_options,
    default_decay,
    optimizer_with,
    options_table,
    why_not_stacked,
)
from fedmerge.training.report import TrainingReport, norm_of_rates, norm_of_steps
from fedmerge.training.schedules import factor_at, schedule_of

__all__ = ["USUAL_NAMES", "LocalTraining"]

USUAL_NAMES = {
    "bs": "batch_size",
    "local_batch_size": "batch_size",
    "local_epochs": "epochs",
    "local_steps": "steps",
    "lr": "learning_rate",
    "mu": "proximal_mu",
    "num_epochs": "epochs",
    "wd": "weight_decay",
}
"""What Flower's templates and other programs call the settings of local training."""

_USUAL_EPOCHS = 2
_WHOLE = ("epochs", "steps", "batch_size", "accumulate", "patience", "total_rounds")
_NUMBERS = ("learning_rate", "momentum", "weight_decay", "proximal_mu", "clip_norm")


@tell_keywords(USUAL_NAMES)
@dataclass(frozen=True)
class LocalTraining:
    """How a client trains.

    Parameters
    ----------
    optimizer
        Any of ``torch.optim`` but LBFGS, in any case: ``"sgd"``, ``"AdamW"``, ``"rmsprop"``; fresh in every round. SGD,
        Adam and AdamW train stacked, the others one client after the other.
    learning_rate, momentum, weight_decay
        As in ``torch.optim``; momentum is SGD's. A weight decay that is left out is the optimiser's own.
    optimizer_options
        Its other options: ``{"betas": [0.9, 0.99]}``; in a message, JSON.
    proximal_mu
        Weight of the proximal term ``mu / 2 ||theta - theta_0||^2`` (FedProx, arXiv 1812.06127).
    epochs, steps
        Passes over the client's examples, or a number of optimiser steps; two epochs where neither is given.
    batch_size
        Examples per batch.
    accumulate
        Batches whose gradients make one step; ``batch_size = 8, accumulate = 4`` steps as ``batch_size = 32`` does.
    clip_norm
        Largest gradient norm; None does not clip.
    personal_epochs
        Passes over a client's examples that train its personal part alone, before the shared part is trained alone
        (FedRep, arXiv 2102.07078); 0 trains both together (FedPer, arXiv 1912.00818).
    frozen_mode
        ``"eval"``: parts of the model that are frozen as a whole run as in use while the rest trains, without dropout
        and on the running statistics of their batch norms. ``"train"``: like the rest.
    schedule, total_rounds
        Factors on the learning rate from round to round, such as ``"warmup(length=3)+cosine"``, see
        :func:`~fedmerge.training.schedules.schedule_of`; and how many rounds there are, for those that go by it. A
        configuration of a comparison fills it in with its ``rounds``.
    step_schedule
        The same from step to step of a client's round.
    autocast
        ``"bfloat16"`` runs the forward pass in mixed precision; parameters and steps stay as they are.
    patience
        Stop once the loss on the client's held-out examples has not fallen for so many passes over its training
        examples, and send the model of the best pass. A client that holds out none trains to the end.
    linearised
        Patterns of parameters in which clients train the model's linearisation ``f(x; w0) + J(x; w0) (w - w0)``
        instead of the model, such as ``["*"]`` or ``["encoder.*"]``, see :class:`~fedmerge.models.tangent.Tangent`
        (arXiv 2305.12827). In a federation w0 is what ``model_fn`` makes, in every round, and the merged model is
        judged as linearised; :func:`~fedmerge.training.train` takes the model that it is given for w0.
    train_fn
        A training function of one's own instead, or its name ``"module:function"``, see
        :mod:`fedmerge.training.own_training`.

    Raises
    ------
    UnknownName
        An optimiser, schedule or option that does not exist.
    InvalidOption
        A value out of its range, or two settings that do not go together.
    """

    optimizer: str = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float | None = None
    proximal_mu: float = 0.0
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 32
    clip_norm: float | None = None
    personal_epochs: int = 0
    frozen_mode: FrozenMode = "eval"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    accumulate: int = 1
    schedule: str = "constant"
    total_rounds: int | None = None
    step_schedule: str = "constant"
    autocast: Literal["bfloat16"] | None = None
    patience: int | None = None
    linearised: Sequence[str] = ()
    train_fn: str | Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        def demand(valid: bool, name: str, want: str) -> None:
            if not valid:
                raise InvalidOption(f"training.{name} must be {want}, got {getattr(self, name)!r}")

        for name in _WHOLE:
            value = getattr(self, name)
            demand(value is None or (isinstance(value, int) and not isinstance(value, bool)), name, "a whole number")
            demand(value is None or value >= 1, name, "at least 1")
        for name in _NUMBERS:
            demand(not isinstance(getattr(self, name), bool), name, "a number")
        for name in ("optimizer", "schedule", "step_schedule"):
            demand(isinstance(getattr(self, name), str), name, "a name")
        for name in ("batch_size", "accumulate"):
            demand(getattr(self, name) is not None, name, "a whole number")
        epochs = self.personal_epochs
        demand(
            isinstance(epochs, int) and not isinstance(epochs, bool) and epochs >= 0, "personal_epochs", "zero or more"
        )
        demand(self.frozen_mode in ("eval", "train"), "frozen_mode", '"eval" or "train"')
        demand(0 < self.learning_rate < math.inf, "learning_rate", "positive")
        demand(0 <= self.momentum < 1, "momentum", "in [0, 1)")
        demand(self.weight_decay is None or 0 <= self.weight_decay < math.inf, "weight_decay", "zero or more")
        demand(0 <= self.proximal_mu < math.inf, "proximal_mu", "zero or more")
        demand(self.epochs is None or self.steps is None, "steps", "left out where epochs are given")
        demand(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "positive, or left out")
        demand(self.autocast in (None, "bfloat16"), "autocast", '"bfloat16", or left out')
        named = isinstance(self.train_fn, str) and ":" in self.train_fn
        demand(named or self.train_fn is None or callable(self.train_fn), "train_fn", "a function or module:function")
        object.__setattr__(self, "linearised", check_patterns(self.linearised, "training.linearised"))
        object.__setattr__(self, "optimizer", self.optimizer.lower())
        object.__setattr__(self, "optimizer_options", options_table(self.optimizer_options))
        check_options(self.optimizer, self.optimizer_options, self.weight_decay)
        if why_not_stacked(self.optimizer, self.optimizer_options) is not None or self.optimizer_options:
            self.make_optimizer([nn.Parameter(torch.zeros(1, 1))])  # torch knows which values its options take
        schedule_of(self.schedule)
        schedule_of(self.step_schedule)

    @property
    def length(self) -> tuple[int | None, int | None]:
        """Epochs and steps, exactly one of them a number."""
        return (None, self.steps) if self.steps is not None else (self.epochs or _USUAL_EPOCHS, None)

    @property
    def examples_per_step(self) -> int:
        """How many examples make up one optimiser step."""
        return self.batch_size * self.accumulate

    @property
    def decay(self) -> float:
        """The weight decay, set or the optimiser's own."""
        return default_decay(self.optimizer) if self.weight_decay is None else self.weight_decay

    @property
    def is_linear(self) -> bool:
        """Whether the way of a client is a sum of its gradients, whose weights are known."""
        return self.optimizer == "sgd" and not self.optimizer_options.get("maximize")

    @property
    def why_serial(self) -> str | None:
        """Why clients train one after the other under these settings; None where they can train stacked."""
        if self.train_fn is not None:
            return "a training function of one's own trains one client at a time"
        reason = why_not_stacked(self.optimizer, self.optimizer_options)
        if reason is not None:
            return reason
        for name, usual in (("autocast", None), ("patience", None), ("accumulate", 1)):
            if getattr(self, name) != usual:
                return f"training.{name} goes with one client at a time"
        return None

    @property
    def own_code(self) -> dict[str, list[str]]:
        """What would be imported, by what it is: a training function and schedules of one's own.

        Examples
        --------
        >>> LocalTraining(schedule="warmup+mine:falling(by=2)").own_code
        {'training function': [], 'schedule': ['mine:falling']}
        """
        parts = [*parse_method(self.schedule), *parse_method(self.step_schedule)]
        functions = [self.train_fn] if isinstance(self.train_fn, str) else []
        return {"training function": functions, "schedule": [part.name for part in parts if ":" in part.name]}

    def steps_of(self, examples: int) -> int:
        """Optimiser steps of a client with so many examples.

        Examples
        --------
        >>> LocalTraining(epochs=2, batch_size=10).steps_of(25)
        6
        """
        epochs, steps = self.length
        return steps or (epochs or 0) * -(-examples // self.examples_per_step)

    def in_round(self, round: int) -> LocalTraining:
        """The settings of one round, from 1, with the learning rate that the schedule gives; again of these, the same.

        Examples
        --------
        >>> LocalTraining(learning_rate=1.0, schedule="step(every=2,factor=0.5)").in_round(3).learning_rate
        0.5
        """
        if self.schedule == "constant":
            return self
        factor = factor_at(self.schedule, max(round - 1, 0), self.total_rounds)
        return replace(self, learning_rate=self.learning_rate * factor, schedule="constant")

    def trained_as(self, model: nn.Module) -> nn.Module:
        """What is trained of `model`, with its tensors: itself, or its linearisation around what it is now.

        One that is linearised already stays as it is.

        Raises
        ------
        UnknownName, InvalidOption, ModelError
            As :func:`~fedmerge.models.tangent.linearise`.

        Examples
        --------
        >>> LocalTraining(linearised=["*"]).trained_as(nn.Linear(1, 1)).linearised
        ('weight', 'bias')
        """
        return linearise(model, self.linearised) if self.linearised else model

    def rates(self, steps: int) -> list[float] | None:
        """The learning rate of each of a client's steps; None where it is always the same."""
        if self.step_schedule == "constant":
            return None
        return [self.learning_rate * factor_at(self.step_schedule, step, steps) for step in range(steps)]

    def report(self, steps: int, loss: float, rates: Sequence[float] | None = None) -> TrainingReport:
        """The report of a client that took so many steps at this mean loss, at these learning rates."""
        # Adam's steps are no linear recursion in the gradients, so its constants do not describe them.
        linear = self.is_linear
        momentum, mu = (self.momentum, self.proximal_mu) if linear else (0.0, 0.0)
        return TrainingReport(steps, loss, self.learning_rate, momentum, mu, self._rate_share(steps, rates))

    def _rate_share(self, steps: int, rates: Sequence[float] | None) -> float:
        damping = {name: value for name in ("dampening", "nesterov") if (value := self.optimizer_options.get(name))}
        if rates is None and not (damping and self.is_linear):
            return 1.0
        rates = [self.learning_rate] * steps if rates is None else rates[:steps]
        if not self.is_linear:
            return math.fsum(rates) / (steps * self.learning_rate)
        usual = norm_of_steps(steps, self.momentum, self.learning_rate * self.proximal_mu)
        return norm_of_rates(rates, self.momentum, self.proximal_mu, **damping) / (self.learning_rate * usual)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimiser.

        Raises
        ------
        InvalidOption
            It does not take such options, or such parameters.
        """
        try:
            return self._optimizer_of(parameters)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidOption(f"training.optimizer = {self.optimizer!r}: {error}") from error

    @cached_property
    def _optimizer_of(self) -> Callable[..., torch.optim.Optimizer]:
        """Settled once: clients make a fresh optimiser in every round."""
        options = self.optimizer_options
        return optimizer_with(self.optimizer, options, self.learning_rate, self.momentum, self.weight_decay)
