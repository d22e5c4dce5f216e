"""What the clients' own models reach before any merge: their ensemble, and the best of them alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from flwr.app import Message
from torch import Tensor

from fedmerge.errors import BadUpdate
from fedmerge.simulation.runs.experiment import Experiment
from fedmerge.simulation.runs.global_judge import Judge
from fedmerge.strategies.identity import identify
from fedmerge.tasks import Classification, Task
from fedmerge.wire.flower_records import decode_update

__all__ = ["REFERENCES", "reference_accuracies"]

REFERENCES = ("ensemble", "best client")
"""Names of the references, in the order of a table."""


def reference_accuracies(experiment: Experiment, replies: Iterable[Message]) -> dict[str, float]:
    """Test accuracy of the ensemble of the models that clients sent, and of the best single one.

    The ensemble averages what the models expect: probabilities, or numbers. Where examples are of one class each it
    weighs every client's probability of a class by the client's share of the training examples of that class, else
    all by their examples. That is more than a server usually knows: a line to measure merges by, no method. In tasks
    without an accuracy it is the loss. Replies without a usable model are left out; without any there are no
    references.
    """
    judge = Judge(experiment)
    found: list[tuple[int, Tensor]] = []
    judged: list[float] = []
    for client, reply in identify(replies):
        try:
            state = decode_update(client, reply.content, "arrays", "num-examples").state
            task, expected, targets = judge.predictions(state)
        except (BadUpdate, RuntimeError):
            continue
        found.append((client, expected.double()))
        judged.append(_judged(task, expected, targets))
    if not found:
        return {}
    best = max(judged) if _decides(task, found[0][1], targets) else min(judged)
    weights = _weights(experiment, task, found, targets)
    total = sum(weight * expected for weight, (_, expected) in zip(weights, found, strict=True))
    return dict(zip(REFERENCES, (_judged(task, torch.as_tensor(total), targets), best), strict=True))


def _weights(experiment: Experiment, task: Task, found: Sequence[tuple[int, Tensor]], targets: Tensor) -> list[Tensor]:
    """What each client's expectation counts: for each class, or alike for all outputs."""
    partition, dataset = experiment.partition, experiment.dataset
    sizes = torch.tensor([float(len(rows)) for rows in partition.train], dtype=torch.float64)
    shares = (sizes / sizes.sum()).tolist()
    if not isinstance(task, Classification) or targets.is_floating_point() or not dataset.num_classes:
        known = torch.tensor([shares[client] if client < len(shares) else 0.0 for client, _ in found])
        return [*(known / known.sum())]
    counts = partition.label_counts(dataset.train_labels, dataset.num_classes).double()
    counts = counts / counts.sum(0).clamp_min(1)
    axis, outputs = task.axis(found[0][1], targets), found[0][1]
    shape = [-1 if i == axis else 1 for i in range(outputs.ndim)]
    beyond = outputs.shape[axis] - dataset.num_classes  # outputs for classes that no example has
    each = [counts[client] if client < len(counts) else torch.ones(dataset.num_classes) for client, _ in found]
    return [torch.cat([weights, weights.new_zeros(beyond)]).view(shape) for weights in each]


def _decides(task: Task, expected: Tensor, targets: Tensor) -> bool:
    return task.hits(task.as_outputs(expected), targets) is not None


def _judged(task: Task, expected: Tensor, targets: Tensor) -> float:
    """Accuracy, or the loss where there is none."""
    found = task.sums(task.as_outputs(expected), targets)
    return float(found["hits"] / found["labels"]) if "hits" in found else float(found["loss"] / found["weight"])
