"""A cohort trained one client after the other: what every model can, in the form that stacked training returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.tasks import Task
from fedmerge.training.cohort import TrainedCohort
from fedmerge.training.cohort_batches import Participant
from fedmerge.training.correction import Correction
from fedmerge.training.local import train
from fedmerge.training.local_training import LocalTraining
from fedmerge.training.model_on_data import ModelSnapshot

__all__ = ["train_one_by_one"]


def train_one_by_one(
    model: nn.Module,
    participants: Sequence[Participant],
    settings: LocalTraining,
    *,
    seed: int,
    round: int,
    pull: float = 0.0,
    task: Task | None = None,
) -> TrainedCohort:
    """Train all `participants`, each from `model`; parameters and errors as in `train_cohort`.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> clients = [Participant(i, torch.randn(6, 2), torch.zeros(6, dtype=torch.long)) for i in range(4)]
    >>> train_one_by_one(nn.Linear(2, 3), clients, LocalTraining(), seed=0, round=1).states["bias"].shape
    torch.Size([4, 3])
    """
    if not participants:
        raise InvalidOption("there are no participants to train")
    states: dict[str, Tensor] = {}
    reports = []
    with _borrowed(model) as fresh:
        for index, participant in enumerate(participants):
            report = train(
                model, participant.data, None, settings, seed=seed, client=participant.client, round=round, task=task,
                correction=Correction(pull, participant.offset), held_out=participant.held_out,
            )  # fmt: skip
            reports.append(report)
            for name, tensor in model.state_dict().items():
                if index == 0:
                    states[name] = tensor.new_empty(len(participants), *tensor.shape)
                states[name][index] = tensor
            fresh.restore()
    return TrainedCohort(states, reports)


@contextmanager
def _borrowed(model: nn.Module) -> Iterator[ModelSnapshot]:
    """Leave the model as it is when done. No copy of it: a forward may hold on to the very module it belongs to."""
    fresh = ModelSnapshot(model)
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        yield fresh
    finally:
        fresh.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient
