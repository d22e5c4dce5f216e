"""SGD's momentum, kept by each client from round to round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.training.correction import Correction
from fedmerge.training.report import TrainingReport
from fedmerge.training.rules.local_rule import LocalRule

if TYPE_CHECKING:
    from fedmerge.training.local_training import LocalTraining

__all__ = ["KeptMomentum"]


@register("kept_momentum", paper="arXiv:2306.07684")
@dataclass(frozen=True)
class KeptMomentum(LocalRule):
    """Begin with the momentum that the client's last round ended with: ``v_0 = v_K`` of the round before.

    Local training otherwise begins at ``v_0 = 0``. With it, rounds of a single client are one run of SGD, however
    they are cut. A client keeps one model of memory, and trains by itself: no stack holds momenta that differ.

    Examples
    --------
    >>> import torch
    >>> KeptMomentum().correction({}, {"w": torch.ones(1)}).velocity
    {'w': tensor([1.])}
    """

    name: ClassVar[str] = "kept_momentum"
    keeps: ClassVar[bool] = True
    starts_apart: ClassVar[bool] = True

    def check(self, settings: LocalTraining) -> None:
        """Refuse training without such a momentum, or that cannot go on from it."""
        why = None
        if settings.train_fn is not None:
            why = "a training function of one's own (training.train_fn) makes its optimiser itself; leave it out"
        elif settings.optimizer != "sgd":
            why = f"training.optimizer = {settings.optimizer!r} has another memory; take sgd"
        elif settings.personal_epochs:
            why = "training.personal_epochs divides a round in two, each with its own optimiser; leave it out"
        elif settings.patience is not None:
            why = "training.patience goes back to an earlier model, whose momentum is gone; leave it out"
        if why is not None:
            raise InvalidOption(f"lookaround has clients keep SGD's momentum, and {why}")

    def correction(self, sent: State, kept: State) -> Correction:
        """The momentum to begin with; zero in a client's first round."""
        return Correction(velocity=kept)

    def keep(self, moved: State, sent: State, kept: State, report: TrainingReport) -> dict[str, Tensor]:
        """The momentum after the last step; nothing where training has none."""
        return dict(report.velocity)
