"""Training in the tangent space, one by one and stacked, and what a message may say of it."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from torch import nn

from fedmerge.clients import client_app
from fedmerge.clients.told_training import told_training
from fedmerge.data import ClientData
from fedmerge.errors import CannotStack, InvalidOption, UnknownName
from fedmerge.models.tangent import linearise
from fedmerge.tasks import make_task
from fedmerge.training import LocalTraining, Participant, train, train_cohort, train_one_by_one

DRAWS = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 4, generator=DRAWS), torch.randint(0, 3, (24,), generator=DRAWS)
SQUARES = make_task(loss="torch.nn.functional:mse_loss")
TANGENT = LocalTraining(linearised=["*"], learning_rate=0.3, epochs=3, batch_size=8)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 3))


def pictures():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.AvgPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip


def trained(model, settings, **more):
    report = train(model, X, Y, settings, seed=0, client=0, round=1, **more)
    return report, model.state_dict()


def test_of_a_linear_model_it_is_ordinary_training():
    def linear():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Linear(4, 3)

    settings = LocalTraining(learning_rate=0.3, epochs=3, batch_size=8)
    (report, state), (usual, expected) = trained(linear(), TANGENT), trained(linear(), settings)
    assert report.loss == pytest.approx(usual.loss, abs=1e-6)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_the_first_step_is_that_of_the_model_and_later_ones_are_not():
    def after(steps, linearised):
        settings = LocalTraining(linearised=linearised, learning_rate=0.3, steps=steps, batch_size=24)
        return trained(net(), settings)[1]["0.weight"]

    torch.testing.assert_close(after(1, ["*"]), after(1, []), rtol=0, atol=1e-6)
    assert (after(4, ["*"]) - after(4, [])).abs().max() > 1e-3


def test_it_descends_as_the_formula_says():
    """Two steps on a model of one hidden unit, whose gradient of a square is written out in NumPy."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False)).double()
    for part, value in ((0, 0.7), (2, -1.2)):
        nn.init.constant_(model[part].weight, value)
    x, y = torch.tensor([[0.5], [2.0]], dtype=torch.float64), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    settings = LocalTraining(linearised=["*"], learning_rate=0.1, momentum=0.0, steps=2, batch_size=2)
    train(model, x, y, settings, seed=0, client=0, round=1, task=SQUARES)
    a, b, inputs, targets = 0.7, -1.2, x.numpy()[:, 0], y.numpy()[:, 0]
    jacobian = np.stack([b * inputs / np.cosh(a * inputs) ** 2, np.tanh(a * inputs)], 1)
    change = np.zeros(2)
    for _ in range(2):
        residual = b * np.tanh(a * inputs) + jacobian @ change - targets
        change -= 0.1 * 2 * jacobian.T @ residual / 2  # of the mean of squares
    found = np.array([float(model[0].weight), float(model[2].weight)])
    np.testing.assert_allclose(found, np.array([a, b]) + change, rtol=1e-9)


@pytest.mark.parametrize("make", [net, pictures])
def test_stacked_it_ends_where_one_by_one_ends(make):
    people = [Participant(i, X[: 24 - 7 * i], Y[: 24 - 7 * i]) for i in range(3)]
    stacked = train_cohort(make(), people, TANGENT, seed=0, round=1)
    serial = train_one_by_one(make(), people, TANGENT, seed=0, round=1)
    for name, tensor in serial.states.items():
        torch.testing.assert_close(stacked.states[name], tensor, rtol=1e-4, atol=1e-5)
    weight = "7.weight" if make is pictures else "0.weight"
    assert not torch.equal(serial.states[weight][0], make().state_dict()[weight])


def test_what_does_not_stack_of_the_model_does_not_linearised_either():
    model = nn.GRU(4, 3, batch_first=True)
    with pytest.raises(CannotStack, match="GRU"):
        train_cohort(model, [Participant(0, X[:, None], Y)], TANGENT, seed=0, round=1)


def test_statistics_of_batch_norms_stay_as_they_are():
    model = pictures()
    trained(model, TANGENT)
    assert not model[2].num_batches_tracked
    assert not model[2].running_mean.any()


def test_a_part_and_a_proximal_term():
    settings = LocalTraining(linearised=["0"], learning_rate=0.1, epochs=2, proximal_mu=0.5)
    model = net()
    trained(model, settings)
    assert (model[3].weight - net()[3].weight).abs().max() > 1e-3
    with pytest.raises(UnknownName, match="encoder"):
        trained(net(), LocalTraining(linearised=["encoder.*"]))


def test_a_training_function_of_ones_own_is_given_the_linearised_model():
    seen = []

    def train_fn(model, batches, settings):
        seen.append(model)
        return {"steps": 1, "loss": 0.0}

    trained(net(), LocalTraining(linearised=["*"], train_fn=train_fn))
    assert seen[0].linearised[0] == "0.weight"


def test_one_that_is_linearised_keeps_its_point():
    model = linearise(net())
    start = model.start["0.weight"].clone()
    trained(model, TANGENT)
    trained(model, TANGENT)
    assert torch.equal(model.start["0.weight"], start)
    assert not torch.equal(model.get_parameter("0.weight"), start)


def test_the_setting_is_checked():
    with pytest.raises(InvalidOption, match=r"training.linearised must be a list of patterns"):
        LocalTraining(linearised="*")
    assert LocalTraining(linearised=["a.*"]).linearised == ("a.*",)


def test_a_message_may_set_it():
    assert told_training(LocalTraining(), ConfigRecord({"linearised": ["*"]})).linearised == ("*",)
    assert told_training(TANGENT, ConfigRecord({"lr": 0.5})).linearised == ("*",)


def test_clients_that_start_apart_have_no_point_in_common():
    rows = ClientData(X, Y, X, Y)
    with pytest.raises(InvalidOption, match="own_model_fn has clients start apart"):
        client_app(net, lambda partition_id, num_partitions: rows, training=TANGENT, own_model_fn=lambda i: net())
