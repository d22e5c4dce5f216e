"""A loss of one's own beside a task: clients train with the loss, models are judged as the task."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fedmerge.errors import TaskError
from fedmerge.tasks import Classification, make_task, task_of


def dice(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    chosen, true = outputs.softmax(1), F.one_hot(targets, outputs.shape[1]).movedim(-1, 1)
    return 1 - 2 * (chosen * true).sum() / (chosen.sum() + true.sum())


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (4, 5, 5), generator=generator)
    targets[0, 0] = -100  # what does not count for the judge
    return torch.randn(4, 3, 5, 5, generator=generator), targets


def test_decisions_metrics_and_counts_are_the_tasks_and_the_loss_is_ones_own():
    outputs, targets = pictures()
    loss = "torch.nn.functional:multi_margin_loss"  # some loss without a likelihood
    task = make_task("classification", loss=loss, metrics=["iou", "f1"])
    plain = Classification(metrics=("iou", "f1"))
    assert torch.equal(task.hits(outputs, targets), plain.hits(outputs, targets))
    assert torch.equal(task.labels(outputs, targets), plain.labels(outputs, targets))
    assert [metric.name for metric in task.measured] == ["iou", "f1"]
    flat, classes = outputs.movedim(1, -1).reshape(-1, 3)[5:], targets.flatten()[5:]
    figures, wanted = (one.figures(one.sums(flat, classes)) for one in (task, plain))
    assert figures["loss"] == pytest.approx(float(F.multi_margin_loss(flat, classes)), rel=1e-5)
    assert figures["loss"] != pytest.approx(wanted["loss"], rel=1e-3)
    assert {name: figures[name] for name in ("accuracy", "iou", "f1")} == {
        name: wanted[name] for name in ("accuracy", "iou", "f1")
    }


def test_options_are_those_of_the_task_that_is_named():
    loss = "torch.nn.functional:multi_margin_loss"
    assert make_task("classification", {"ignore_index": 7}, loss=loss).judge == Classification(ignore_index=7)


def test_metrics_that_are_usual_for_the_task_are_usual_here():
    task = make_task("multilabel", loss="torch.nn.functional:l1_loss")
    assert [metric.name for metric in task.measured] == [metric.name for metric in make_task("multilabel").measured]


def test_a_loss_with_a_likelihood_of_its_own_says_the_same_as_a_name():
    with pytest.raises(TaskError, match=r"say the same thing.*name one of them"):
        make_task("classification", loss="torch.nn.functional:cross_entropy")


def test_a_metric_of_decisions_names_the_loss_and_the_remedy():
    metric = make_task("classification", metrics=["iou"]).measured[0]
    with pytest.raises(TaskError, match=r'the loss dice makes none.*name = "classification"') as caught:
        metric.sums(task_of(dice), torch.randn(4, 1), torch.randn(4))
    assert " at 0x" not in str(caught.value)


def cubed(outputs, targets):
    return outputs.pow(3)


NUMBERS = torch.tensor([[1.0], [4.0], [-2.0]]), torch.tensor([[2.0], [1.0], [-2.5]])
ANSWERS = torch.tensor([[1.0], [4.0], [-2.0]]), torch.tensor([[1.0], [0.0], [0.0]])
CLASSES = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 3.0]]), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("data", "name", "metrics"),
    [
        (NUMBERS, "regression", ["mae", "rmse", "r2"]),
        (ANSWERS, "binary", ["f1", "auroc", "accuracy"]),
        (CLASSES, "classification", ["f1", "iou", "perplexity", "accuracy"]),
        (pictures(), "classification", ["iou", "accuracy"]),
    ],
)
def test_a_loss_alone_takes_every_metric_that_its_outputs_and_targets_tell(data, name, metrics):
    ours, theirs = make_task(loss=f"{__name__}:cubed", metrics=metrics), make_task(name, metrics=metrics)
    found, wanted = (task.figures(task.sums(*data)) for task in (ours, theirs))
    assert {name: found[name] for name in metrics} == pytest.approx({name: wanted[name] for name in metrics}, rel=1e-5)
    assert set(found) == {"loss", *metrics}


@pytest.mark.parametrize(
    ("data", "metric"), [(NUMBERS, "f1"), (NUMBERS, "accuracy"), (CLASSES, "mae"), (NUMBERS, "perplexity")]
)
def test_a_metric_that_they_do_not_tell_is_refused(data, metric):
    loss = "torch.nn.functional:l1_loss" if data is NUMBERS else f"{__name__}:cubed"
    with pytest.raises(TaskError, match=f"metric '{metric}'"):
        make_task(loss=loss, metrics=[metric]).sums(*data)
