"""Models at hand merged as linearisations of what they started from."""

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import InvalidOption, ModelError
from fedmerge.merging import build_pipeline
from fedmerge.merging.tangent_check import check_linearised
from fedmerge.models.tangent import Tangent, linearise
from fedmerge.training import LocalTraining, train

INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))


def net():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture(scope="module")
def clients():
    """Plain modules with the parameters that three clients trained in the tangent space of one base."""
    found = []
    for client in range(3):
        draws, model = torch.Generator().manual_seed(client), net()
        x, y = torch.randn(20, 4, generator=draws), torch.randint(0, 3, (20,), generator=draws)
        settings = LocalTraining(linearised=["*"], learning_rate=0.3, epochs=4)
        train(model, x, y, settings, seed=0, client=client, round=1)
        found.append(model)
    return found


def tangent(model):
    made = linearise(net())
    made.load_state_dict(model.state_dict())
    return made


def outputs(model):
    with torch.no_grad():
        return model(INPUTS)


def test_what_is_merged_is_the_ensemble_of_the_clients(clients):
    merged = fedmerge.merge(clients, "linearised+fedavg", base=net(), weights=[1, 2, 3])
    assert isinstance(merged, Tangent)
    ensemble = sum(weight * outputs(tangent(one)) for weight, one in zip((1, 2, 3), clients, strict=True)) / 6
    torch.testing.assert_close(outputs(merged), ensemble, rtol=0, atol=1e-6)
    assert (outputs(fedmerge.merge(clients, weights=[1, 2, 3])) - ensemble).abs().max() > 1e-3


def test_a_client_that_is_taken_away_takes_its_outputs_along(clients):
    """What forgetting a shard of the data is, Liu and Soatto 2023, section 3.3."""
    base = net()
    method = "linearised+task_arithmetic(form=sum,scale=1.0)"
    whole = fedmerge.merge(clients, method, base=base)
    without = fedmerge.merge([whole.plain, clients[2]], method, base=base, weights=[1, -1])
    expected = outputs(fedmerge.merge(clients[:2], method, base=base))
    torch.testing.assert_close(outputs(without), expected, rtol=0, atol=1e-5)


def test_models_that_are_linearised_already_need_no_edit(clients):
    merged = fedmerge.merge([tangent(one) for one in clients], "fedavg")
    edited = fedmerge.merge(clients, "linearised+fedavg", base=net())
    torch.testing.assert_close(outputs(merged), outputs(edited), rtol=0, atol=1e-6)


def test_it_goes_with_other_edits(clients):
    merged = fedmerge.merge(clients, "trim(density=0.5)+linearised(parameters=['0'])+fedavg", base=net())
    assert merged.linearised == ("0.weight", "0.bias")


def test_without_a_base_there_is_no_point_to_expand_around(clients):
    with pytest.raises(InvalidOption, match="Linearised linearises the model that all started from: pass base="):
        fedmerge.merge(clients, "linearised+fedavg")


def test_models_around_different_points_are_refused(clients):
    apart = linearise(fedmerge.merge(clients))
    with pytest.raises(InvalidOption, match=r"models\[1\] is not linearised around the same point"):
        fedmerge.merge([tangent(clients[0]), apart])
    with pytest.raises(InvalidOption, match=r"models\[0\] is not linearised"):
        fedmerge.merge([clients[0], tangent(clients[1])])
    with pytest.raises(InvalidOption, match="linearised already"):
        fedmerge.merge([tangent(one) for one in clients], "linearised(parameters=['0'])+fedavg", base=net())


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("otfusion", "re-orders neurons"),
        ("regmean", "needs 'gram', which is measured within layers"),
        ("fedavg+ridge_head", "RidgeHead needs"),
        ("fedavg+recalibrate", "measures batch norms anew"),
    ],
)
def test_methods_that_look_inside_are_refused(method, told):
    with pytest.raises(InvalidOption, match=told):
        check_linearised(build_pipeline(method))


@pytest.mark.parametrize(
    "method", ["fednova", "ties", "adamerging", "metagpt", "fedavg+server_adam", "fedgma", "slerp"]
)
def test_methods_that_take_numbers_as_they_are_go(method):
    check_linearised(build_pipeline(method))


def test_what_is_measured_within_layers_is_refused_of_a_module_too(clients):
    model, labels = tangent(clients[0]), torch.zeros(6, dtype=torch.long)
    with pytest.raises(InvalidOption, match="cannot be measured of a linearised model"):
        fedmerge.compute_statistics(model, [(INPUTS, labels)], ["gram"])
    with pytest.raises(ModelError, match="neurons of a linearised model cannot be re-ordered"):
        fedmerge.permutations.trace(model, INPUTS)


def test_two_edits_that_contradict_each_other_are_refused():
    with pytest.raises(InvalidOption, match="two edits linearise"):
        _ = build_pipeline("linearised+linearised(parameters=['0'])+fedavg").linearises
    with pytest.raises(InvalidOption, match="option parameters = 'body' is not valid"):
        build_pipeline("linearised(parameters=body)+fedavg")
