"""Outputs against labels: one class axis, one set of labels that count, one definition of accuracy, in both engines."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn
from torch.nn import functional as F

from fedmerge.data import ClientData
from fedmerge.errors import DataError, FedMergeError, InvalidOption, ModelError
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import FedAvg, client_app
from fedmerge.tasks import AnyLoss, Classification
from fedmerge.training import (
    Judged,
    LocalTraining,
    Participant,
    evaluate,
    judge,
    train,
    train_cohort,
    train_one_by_one,
)

NAMES = {"seed": 0, "round": 1}
SETTINGS = LocalTraining(learning_rate=0.2, epochs=2, batch_size=3)
RNG = torch.Generator().manual_seed(0)
TOKENS = torch.randint(5, (8, 4), generator=RNG)


def made(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def lookup(classes=4):
    return made(lambda: nn.Embedding(5, classes))


class Turned(nn.Module):
    """Scores in torch's own layout, [N, C, ...]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).movedim(-1, 1)


def engines():
    return train_one_by_one, train_cohort


@pytest.mark.parametrize("classes", [3, 4, 6], ids=lambda n: f"{n} classes at 4 positions")
def test_the_class_axis_is_read_from_shapes_and_lengths(classes):
    """Torch's layout trains as the last axis does, with as many classes as positions too."""
    labels = torch.randint(classes, (8, 4), generator=RNG)
    last, turned = lookup(classes), Turned(lookup(classes))
    people = [Participant(0, TOKENS[:5], labels[:5]), Participant(1, TOKENS[5:], labels[5:])]
    want = train_one_by_one(last, people, SETTINGS, **NAMES)
    for engine in engines():
        for model, name in ((last, "weight"), (turned, "model.weight")):
            found = engine(model, people, SETTINGS, **NAMES)
            torch.testing.assert_close(found.states[name], want.states["weight"])
            assert [r.loss for r in found.reports] == pytest.approx([r.loss for r in want.reports])
    hits = (last(TOKENS).argmax(-1) == labels).double().mean().item()
    assert evaluate(last, TOKENS, labels) == pytest.approx((evaluate(turned, TOKENS, labels)[0], hits))


def test_pictures_with_a_class_for_every_pixel():
    x, y = torch.randn(4, 1, 3, 3, generator=RNG), torch.randint(3, (4, 3, 3), generator=RNG)
    model = made(lambda: nn.Conv2d(1, 3, 1))  # as many classes as rows and columns
    loss, accuracy = evaluate(model, x, y)
    assert loss == pytest.approx(F.cross_entropy(model(x), y).item())
    assert accuracy == pytest.approx((model(x).argmax(1) == y).double().mean().item())


def test_a_layout_that_nothing_tells_is_refused():
    class Fixed(nn.Embedding):
        def forward(self, x):
            return super().forward(x.view(-1, 4))

    with pytest.raises(InvalidOption, match=r"client 3: .*as many classes as positions"):
        train(Fixed(5, 4), TOKENS, TOKENS % 4, SETTINGS, client=3, **NAMES)


def padded(people=3):
    labels = TOKENS % 4
    labels = torch.where(torch.arange(4) < torch.arange(8)[:, None] % 4 + 1, labels, -100)
    return [Participant(i, TOKENS[i::people], labels[i::people]) for i in range(people)]


def test_padding_counts_nowhere():
    model, one = lookup(), padded(1)[0]
    scores, real = model(one.x), one.y != -100
    found = judge(model, one.x, one.y, batch_size=3)
    assert (found.labels, found.hits) == (int(real.sum()), int((scores.argmax(-1) == one.y).sum()))
    assert found.loss == pytest.approx(F.cross_entropy(scores[real], one.y[real]).item())
    halves = judge(model, one.x[:3], one.y[:3]) + judge(model, one.x[3:], one.y[3:])
    assert (halves.labels, halves.hits, halves.loss) == (found.labels, found.hits, pytest.approx(found.loss))
    assert Judged().accuracy == 0.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_batch_of_nothing_but_padding_teaches_nothing(momentum):
    """Torch's mean over no label is not a number, and so would be all weights from there on."""
    settings = LocalTraining(learning_rate=0.2, momentum=momentum, epochs=2, batch_size=2)
    people = padded()
    people[1].y[:] = -100
    model = lookup()
    want = train_one_by_one(model, people, settings, **NAMES)
    found = train_cohort(model, people, settings, **NAMES)
    torch.testing.assert_close(found.states["weight"], want.states["weight"])
    assert torch.equal(want.states["weight"][1], model.weight)
    assert want.reports[1].loss == found.reports[1].loss == 0.0
    assert judge(model, people[1].x, people[1].y) == Judged()


def test_the_loss_of_training_is_that_of_the_task():
    one, model = padded(1)[0], lookup()
    settings = LocalTraining(learning_rate=0.2, epochs=1, batch_size=99)
    by_task = train(lookup(), one.x, one.y, settings, client=0, task=Classification(class_axis=-1), **NAMES)
    assert train(model, one.x, one.y, settings, client=0, **NAMES).loss == pytest.approx(by_task.loss)


def squared(outputs, targets):
    assert outputs.shape == targets.shape
    return (outputs - targets).square().mean()


def test_a_task_of_ones_own_trains_on_fractions():
    x = torch.randn(20, 2, generator=RNG)
    model, settings = made(lambda: nn.Linear(2, 1)), LocalTraining(learning_rate=0.1, epochs=99)
    train(model, x, x.sum(1, keepdim=True), settings, client=0, task=AnyLoss(squared), **NAMES)
    assert evaluate(model, x, x.sum(1, keepdim=True), task=AnyLoss(squared))[0] < 1e-3


LINEAR = made(lambda: nn.Linear(3, 4))
FEATURES = torch.randn(6, 3, generator=RNG)
CLASSES = torch.tensor([0, 1, 2, 3, 0, 1])
REFUSED = {
    "too large": (LINEAR, FEATURES, CLASSES + 1, "labels 4 are not among the model's 4 classes, numbered from 0 to 3"),
    "negative": (LINEAR, FEATURES, CLASSES - 1, "labels -1 .*to be ignored to -100"),
    "one-hot": (LINEAR, FEATURES, F.one_hot(CLASSES), r"one-hot.*y.argmax\(1\)"),
    "one-hot fractions": (LINEAR, FEATURES, F.one_hot(CLASSES).float(), r"one-hot.*y.argmax\(1\)"),
    "fractions": (LINEAR, FEATURES, CLASSES.float(), r"float32.*y.long\(\)"),
    "regression": (LINEAR, FEATURES, FEATURES[:, :1], "float32"),
    "one output": (nn.Linear(3, 1), FEATURES, CLASSES * 0, "one score for each label.*output for each class"),
    "other positions": (LINEAR, FEATURES, torch.zeros(6, 2, dtype=torch.long), r", 2\]"),
    "lengths": (LINEAR, FEATURES, CLASSES[:5], "each example a label"),
    "nan": (LINEAR, FEATURES / 0, CLASSES, "NaN|infinite"),
    "doubles": (LINEAR, FEATURES.double(), CLASSES, r"cannot take inputs of torch.float64 .*x.to\(torch.float32\)"),
    "whole inputs": (LINEAR, FEATURES.long(), CLASSES, r"inputs of torch.int64 .*x.to\(torch.float32\)"),
    "lists": (LINEAR, FEATURES.tolist(), CLASSES, "inputs are a list"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_with_the_client_and_a_remedy(kind):
    model, x, y, words = REFUSED[kind]
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(FedMergeError, match=f"client 5: .*{words}"):
        train(model, x, y, SETTINGS, client=5, **NAMES)
    with pytest.raises(FedMergeError, match=f"client 5: .*{words}"):
        judge(model, x, y, what="client 5")
    good = Participant(4, FEATURES, CLASSES.clamp(max=0 if kind == "one output" else 3))
    for engine in engines():
        # Where examples differ in kind from those of others, they cannot be stacked in the first place.
        with pytest.raises(
            FedMergeError, match=f"{words}|{'examples of client 5' if engine is train_cohort else words}"
        ):
            engine(model, [good, Participant(5, x, y)], SETTINGS, **NAMES)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_fractions_for_rows_of_a_table_are_told():
    with pytest.raises(ModelError, match=r"inputs of torch.float32 .*x.to\(torch.int64\)"):
        train(lookup(), TOKENS.float(), TOKENS % 4, SETTINGS, client=0, **NAMES)


def test_outputs_that_are_no_tensor_are_told():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ModelError, match="client 2: the model returns a tuple"):
        train(Pair(3, 4), FEATURES, CLASSES, SETTINGS, client=2, **NAMES)


def test_a_model_without_parameters_is_told():
    with pytest.raises(ModelError, match="Identity has no parameters"):
        train(nn.Identity(), FEATURES, CLASSES, SETTINGS, client=2, **NAMES)
    with pytest.raises(ModelError, match="Identity has no parameters"):
        train_cohort(nn.Identity(), [Participant(0, FEATURES, CLASSES)], SETTINGS, **NAMES)


@pytest.mark.parametrize("hidden", [None, 4], ids=["by hand", "by vmap"])
def test_no_client_trains_on_anothers_labels(hidden):
    """Labels that a client lacks, or that are none of the classes, are never made up from what lies next to them."""
    model = made(
        lambda: nn.Linear(3, 4) if hidden is None else nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 4))
    )
    with pytest.raises(DataError, match=r"client 0: .*each example a label"):
        Participant(0, FEATURES, CLASSES[:3])
    people = [Participant(0, FEATURES, CLASSES), Participant(1, FEATURES, torch.where(CLASSES == 3, -1, CLASSES))]
    with pytest.raises(InvalidOption, match="client 1: labels -1"):
        train_cohort(model, people, SETTINGS, **NAMES)


def evaluated(make, data, engine, **training):
    app = client_app(make, data, training=LocalTraining(learning_rate=0.5, epochs=3, **training))
    with SimulationGrid(app, num_clients=2, engine=engine) as grid:
        found = FedAvg().start(grid, initial_arrays=ArrayRecord(make().state_dict()), num_rounds=2)
    model = make()
    model.load_state_dict(found.arrays.to_torch_state_dict())
    return model, dict(found.evaluate_metrics_clientapp[2])


@pytest.mark.parametrize("engine", ["serial", "stacked", "auto"])
def test_clients_report_the_accuracy_over_all_their_labels(engine):
    """One client has many more labels than the other, in as many examples."""
    labels = torch.where(torch.arange(4) < torch.where(torch.arange(8) % 2 == 0, 4, 1)[:, None], TOKENS % 4, -100)
    model, metrics = evaluated(
        lookup, lambda p, n: ClientData(TOKENS[p::n], labels[p::n], TOKENS[p::n], labels[p::n]), engine, batch_size=4
    )
    hits = (model(TOKENS).argmax(-1) == labels)[labels != -100]
    assert metrics["eval_acc"] == pytest.approx(hits.double().mean().item())
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(model(TOKENS).movedim(-1, 1), labels).item(), rel=1e-5)


def test_labels_in_a_column_are_labels():
    column = evaluated(lambda: made(lambda: nn.Linear(3, 4)),
                       lambda p, n: ClientData(*[FEATURES, CLASSES[:, None].int().numpy()] * 2), "serial")  # fmt: skip
    row = evaluated(lambda: made(lambda: nn.Linear(3, 4)), lambda p, n: ClientData(*[FEATURES, CLASSES] * 2), "serial")
    assert column[1] == row[1]
    assert column[1]["eval_acc"] <= 1


def test_a_task_that_is_told_checks_the_targets_in_training_and_in_judging():
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    told = Classification()
    with pytest.raises(InvalidOption, match="one class"):
        train(model, x, torch.zeros(4, dtype=torch.long), SETTINGS, client=0, task=told, **NAMES)
    with pytest.raises(InvalidOption, match="labels must be whole numbers from 0 to 1"):
        judge(nn.Linear(3, 2), x, torch.tensor([0, 1, 7, 0]), task=told)
