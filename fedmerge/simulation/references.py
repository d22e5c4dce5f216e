"""What the clients' own models reach before any merge: their ensemble, and the best of them alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from flwr.app import Message
from torch import Tensor

from fedmerge.errors import BadUpdate
from fedmerge.simulation.experiment import Experiment
from fedmerge.strategies.identity import identify
from fedmerge.strategies.wire import decode_update
from fedmerge.tasks import Classification

__all__ = ["REFERENCES", "reference_accuracies"]

REFERENCES = ("ensemble", "best client")
"""Names of the references, in the order of a table."""


def reference_accuracies(experiment: Experiment, replies: Iterable[Message]) -> dict[str, float]:
    """Test accuracy of the ensemble of the models that clients sent, and of the best single one.

    The ensemble weighs each client's probability of a class by the client's share of the training examples
    of that class, which is more than a server usually knows: a line to measure merges by, no method. Replies
    without a usable model are left out; without any there are no references.
    """
    dataset = experiment.dataset
    shares = experiment.partition.label_counts(dataset.train_labels, dataset.num_classes).double()
    shares = shares / shares.sum(0).clamp_min(1)
    tested = torch.cat([labels for _, labels in dataset.test.in_order()])
    total, best = torch.zeros(()), 0.0
    for client, reply in identify(replies):
        try:
            state = decode_update(client, reply.content, "arrays", "num-examples").state
            probabilities = experiment.probabilities(state)
        except (BadUpdate, RuntimeError):
            continue
        best = max(best, _accuracy(probabilities, tested))
        weights = shares[client] if client < len(shares) else torch.ones(dataset.num_classes)
        total = total + weights * probabilities[..., : dataset.num_classes].double()
    if total.ndim == 0:
        return {}
    return dict(zip(REFERENCES, (_accuracy(total, tested), best), strict=True))


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    found = Classification(class_axis=-1).sums(scores, labels)
    return float(found["hits"] / found["labels"])
