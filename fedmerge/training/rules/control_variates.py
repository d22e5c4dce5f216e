"""The control variates of SCAFFOLD, on the client's side."""

from __future__ import annotations

from collections.abc import Mapping
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

__all__ = ["ControlVariates"]


@register("control_variates", paper="arXiv:1910.06378")
@dataclass(frozen=True)
class ControlVariates(LocalRule):
    """Correct gradients by how the client's differ from all clients': ``gradient - c_i + c``.

    Karimireddy et al. 2020, algorithm 1, option II: ``c_i+ = c_i - c + (x - y_i) / (K eta)``. Both start at zero, also
    those of a client that is asked for the first time late in a run. Under momentum, a proximal term or a schedule,
    ``K eta`` is what an equal gradient in every step would have moved it, see
    :func:`~fedmerge.training.report.norm_of_rates`.
    """

    name: ClassVar[str] = "control_variates"
    keeps: ClassVar[bool] = True

    def check(self, settings: LocalTraining) -> None:
        """Refuse optimisers whose steps are no sums of gradients."""
        if settings.train_fn is None and not settings.is_linear:
            raise InvalidOption(
                f"control variates (scaffold) are mean gradients, read off the steps of SGD: with training.optimizer = "
                f"{settings.optimizer!r} there are none; take sgd"
            )

    def correction(self, sent: State, kept: State) -> Correction:
        """``c - c_i``."""
        offset: dict[str, Tensor] = dict(sent)
        for name, own in kept.items():
            offset[name] = offset[name] - own if name in offset else -own
        return Correction(offset=offset)

    def keep(self, moved: State, sent: State, kept: State, report: TrainingReport) -> dict[str, Tensor]:
        """``c_i+``."""
        reach = report.reach
        if reach <= 0:
            raise InvalidOption(
                "control variates (scaffold) divide by the learning rate, and the training report has none: "
                "return a TrainingReport with its learning_rate from the training function"
            )
        return {name: _added(kept, name, tensor / reach, sent) for name, tensor in moved.items()}


def _added(kept: Mapping[str, Tensor], name: str, gradient: Tensor, sent: State) -> Tensor:
    if name in kept:
        gradient = gradient + kept[name]
    return gradient - sent[name] if name in sent else gradient
