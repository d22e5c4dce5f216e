"""Tasks trained with stacked weights end where clients do that train one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmerge.errors import CannotStack, InvalidOption, TaskError
from fedmerge.tasks import AnyLoss, Binary, Classification, LanguageModel, Multilabel, Regression
from fedmerge.training import LocalTraining, Participant, train_cohort
from fedmerge.training.engine import choose_engine, has_stacked_loss
from fedmerge.training.one_by_one import train_one_by_one

NAMED = {"seed": 3, "round": 2}
SETTINGS = LocalTraining(learning_rate=0.1, epochs=2, batch_size=4)


def _normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _ignored(labels, mark):
    labels = labels.clone()
    labels.view(-1)[::3] = mark
    return labels


def _whole(n, *shape, high):
    return torch.randint(0, high, (n, *shape), generator=torch.Generator().manual_seed(n))


def _net():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def _dense():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))


def _tokens():
    return nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7))


def _numbers(n):
    numbers = 3 * _normal(n, 3)
    numbers[0, 0] = -100.0  # a number like any other
    return numbers


CASES = {
    "regression": (Regression(), _net, lambda n: _normal(n, 5), _numbers),
    "multilabel": (Multilabel(pos_weight=(1.0, 2.0, 3.0)), _net, lambda n: _normal(n, 5),
                   lambda n: _ignored(_whole(n, 3, high=2), -100)),
    "yes or no": (Binary(ignore_index=-1), lambda: nn.Linear(5, 1), lambda n: _normal(n, 5),
                  lambda n: _ignored(_whole(n, high=2), -1)),
    "segmentation": (Classification(ignore_index=9), _dense, lambda n: _normal(n, 1, 3, 4),
                     lambda n: _ignored(_whole(n, 3, 4, high=3), 9)),
    "smoothed": (Classification(label_smoothing=0.2), _net, lambda n: _normal(n, 5), lambda n: _whole(n, high=3)),
    "language model": (LanguageModel(padding=0), _tokens, lambda n: _whole(n, 6, high=7),
                       lambda n: _whole(n, 6, high=7)),
    "shifted language model": (LanguageModel(padding=0, shift=True), _tokens, lambda n: _whole(n, 6, high=7),
                               lambda n: _whole(n, 6, high=7)),
}  # fmt: skip


def _made(case):
    task, net, inputs, targets = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = net()
    return task, model, [Participant(i, inputs(n), targets(n)) for i, n in enumerate((9, 6, 11))]


@pytest.mark.parametrize("case", CASES)
def test_stacked_and_serial_training_agree(case):
    task, model, people = _made(case)
    assert has_stacked_loss(task, people)
    wanted = train_one_by_one(model, people, SETTINGS, **NAMED, task=task)
    found = train_cohort(model, people, SETTINGS, **NAMED, task=task)
    for name, tensor in wanted.states.items():
        assert not torch.equal(tensor[0], tensor[1])
        torch.testing.assert_close(found.states[name], tensor, rtol=1e-5, atol=1e-5)
    for one, other in zip(found.reports, wanted.reports, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)


@pytest.mark.parametrize("task", [Classification(class_weights=(1.0, 2.0, 3.0)), AnyLoss(nn.functional.l1_loss)])
def test_losses_that_cannot_be_stacked_train_one_by_one(task):
    people = [Participant(0, _normal(4, 5), _whole(4, high=3))]
    assert not has_stacked_loss(task, people)
    with pytest.raises(CannotStack, match="one by one"):
        train_cohort(_net(), people, SETTINGS, **NAMED, task=task)


def test_the_faster_engine_is_measured_on_the_task():
    task, model, people = _made("regression")
    choice = choose_engine(model, people, SETTINGS, **NAMED, task=task, measure=lambda call: (call() and 1.0) or 1.0)
    assert "differ" not in choice.reason


@pytest.mark.parametrize(
    ("case", "wrong"),
    [("multilabel", torch.full((5, 3), 2)), ("regression", torch.zeros(5, 2)), ("smoothed", torch.full((5,), 3))],
)
def test_labels_of_any_client_that_are_none_of_the_task_are_refused(case, wrong):
    task, model, people = _made(case)
    people = [*people[:2], Participant(7, people[2].x[:5], wrong.to(people[2].y.dtype))]
    with pytest.raises((TaskError, InvalidOption, CannotStack)):
        train_cohort(model, people, SETTINGS, **NAMED, task=task)
