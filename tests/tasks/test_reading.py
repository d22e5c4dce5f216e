"""What outputs and targets tell of the task, and what they do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import TaskError
from fedmerge.tasks import Binary, Classification, Reading, Regression, read_task

COLUMN = torch.zeros(4, 1)


@pytest.mark.parametrize(
    ("outputs", "targets", "wanted"),
    [
        (torch.zeros(4, 3), torch.tensor([0, 2, 1, 0]), Classification()),
        (torch.zeros(4, 3, 2, 2), torch.zeros(4, 2, 2, dtype=torch.long), Classification()),
        (torch.zeros(4, 5, 3), torch.full((4, 5), -100), Classification()),
        (torch.zeros(8, 3), torch.zeros(4, 2, dtype=torch.long), Classification()),
        (COLUMN, torch.tensor([0, 1, 1, 0]), Binary()),
        (COLUMN, torch.tensor([[True], [False], [True], [True]]), Binary()),
        (COLUMN[:, 0], torch.tensor([0.0, 1.0, 1.0, 0.0]), Binary()),
        (torch.zeros(4, 1, 2, 2), torch.ones(4, 2, 2, dtype=torch.long), Binary()),
        (torch.zeros(4, 3), torch.tensor([[1.0, 1, 0]] * 4), Binary()),
        (COLUMN, torch.tensor([0.3, -0.2, 0.5, 0.1]), Regression()),
        (COLUMN[:, 0], torch.tensor([0.0, 1.0, 2.0, 0.0]), Regression()),
        (torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 7.0), Regression()),
        (torch.zeros(2, 16), torch.full((2, 1, 4, 4), 7.0), Regression()),
    ],
)
def test_what_can_be_known_is_read(outputs, targets, wanted):
    assert read_task(outputs, targets) == wanted


@pytest.mark.parametrize(
    ("outputs", "targets", "remedy"),
    [
        (COLUMN, torch.tensor([0.3, 0.2, 0.5, 0.1]), 'task="regression"'),
        (COLUMN, torch.tensor([0, 1, 2, 3]), 'task="regression"'),
        (torch.zeros(4, 3), torch.tensor([[0.0, 1.0, 0.0]] * 4), 'task="multilabel"'),
        (torch.zeros(4, 3), torch.tensor([[0, 1, 0]] * 4), r"targets.argmax\(1\)"),
        (torch.zeros(4, 3), torch.tensor([0.0, 1.0, 2.0, 1.0]), r"targets.long\(\)"),
    ],
)
def test_what_cannot_be_known_is_refused_with_a_remedy(outputs, targets, remedy):
    with pytest.raises(TaskError, match=remedy):
        read_task(outputs, targets)


def test_all_batches_tell_what_the_first_does_not():
    x = torch.zeros(3, 4)
    batches = [(x, torch.tensor([0.2, 0.4, 0.9])), (x, torch.tensor([-3.0, 0.5, 2.0]))]
    reading = Reading()
    assert reading(torch.zeros(3, 1), batches[0][1], batches) == Regression()
    assert reading(torch.zeros(3, 1), batches[0][1]) == Regression()
    with pytest.raises(TaskError):
        Reading()(torch.zeros(3, 1), batches[0][1], iter(batches))  # reading on would use them up


def test_batches_that_contradict_each_other_are_refused():
    reading = Reading()
    assert reading(COLUMN, torch.tensor([0.0, 1.0, 0.0, 1.0])) == Binary()
    with pytest.raises(TaskError, match="task="):
        reading(COLUMN, torch.tensor([0.0, 3.0, 0.0, 1.0]))
    reading = Reading()
    reading(COLUMN, torch.tensor([0, 1, 0, 1]))
    with pytest.raises(TaskError, match="regression"):
        reading(COLUMN, torch.tensor([0, 1, 2, 1]))


def test_what_is_told_is_not_read_but_checked():
    assert Reading(Regression())(COLUMN, torch.tensor([0, 1, 0, 1])) == Regression()
    with pytest.raises(TaskError, match="whole numbers from 0 to 2"):
        Reading(Classification())(torch.zeros(2, 3), torch.tensor([0, 3]))


def test_one_reading_serves_all_clients_of_a_merge():
    model = nn.Linear(3, 1)
    x = torch.randn(20, 3)
    yes, numbers = (x[:, 0] > 0).float(), 5 * x[:, 0]
    with pytest.raises(TaskError, match="task="):
        fedmerge.merge([model, model], "fisher", clients=[[(x, yes)], [(x, numbers)]])
    fedmerge.merge([model, model], "fisher", clients=[[(x, yes)], [(x, numbers)]], task="regression")


@pytest.mark.parametrize("last", [True, False])
def test_a_shorter_input_tells_the_class_axis_where_shapes_do_not(last):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Embedding(9, 3)

        def forward(self, tokens):
            found = self.scores(tokens)
            return found if last else found.transpose(1, 2)

    model, tokens = Tagger(), torch.randint(0, 9, (4, 3))  # as many classes as tokens
    labels = torch.randint(0, 3, (4, 3))
    found, told = (
        fedmerge.compute_statistics(model, [(tokens, labels)], ["fisher_diag"], task=task)["fisher_diag"]
        for task in (None, Classification(class_axis=2 if last else 1))
    )
    assert torch.equal(found["scores.weight"], told["scores.weight"])
    other = fedmerge.compute_statistics(
        model, [(tokens, labels)], ["fisher_diag"], task=Classification(class_axis=1 if last else 2)
    )
    assert not torch.equal(found["scores.weight"], other["fisher_diag"]["scores.weight"])
