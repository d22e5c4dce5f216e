"""Models of negative weight are subtracted, where a method can, and refused by name where not."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fedmerge
from fedmerge import BadUpdate, ClientUpdate, InvalidOption, MergeContext
from fedmerge.errors import ConfigError
from fedmerge.merging import build_pipeline
from fedmerge.offline.merge_files import merge_files
from fedmerge.records.run_records import write_tensors

ABLE = ["task_arithmetic", "metagpt", "fedgma", "magmax", "model_stock"]


def model(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        made[1].running_mean += seed
        made[1].running_var += seed
        made[1].num_batches_tracked += seed
    return made


BASE, A, B, C = map(model, range(4))


def vector(trained, base=BASE):
    return {n: p.detach() - dict(base.named_parameters())[n].detach() for n, p in trained.named_parameters()}


def check(merged, *terms):
    """That the parameters of `merged` are the base's and these multiples of task vectors."""
    for name, parameter in merged.named_parameters():
        want = dict(BASE.named_parameters())[name] + sum(factor * tau[name] for factor, tau in terms)
        torch.testing.assert_close(parameter.detach(), want.detach(), rtol=1e-5, atol=1e-6)


def test_a_model_is_forgotten():
    forgot = fedmerge.merge([A], "task_arithmetic", base=BASE, weights=[-1], scale=0.4)
    check(forgot, (-0.4, vector(A)))
    again = fedmerge.merge([A], "task_arithmetic", base=forgot, scale=0.0)
    torch.testing.assert_close(dict(again.named_parameters()), dict(forgot.named_parameters()), rtol=0, atol=0)


def test_what_is_forgotten_and_learnt_again_is_the_base():
    forgot = fedmerge.merge([A], "task_arithmetic", base=BASE, weights=[-1])
    turned = copy.deepcopy(BASE)
    for name, parameter in turned.named_parameters():
        parameter.data += vector(A)[name]
    check(fedmerge.merge([forgot, turned], "task_arithmetic", base=BASE, form="sum"))


def test_an_analogy():
    check(
        fedmerge.merge([A, B, C], "task_arithmetic", base=BASE, weights=[-1, 1, 1], scale=0.5),
        (-0.5, vector(A)), (0.5, vector(B)), (0.5, vector(C)),
    )  # fmt: skip


def test_a_client_is_taken_out_of_an_average_exactly():
    average = fedmerge.merge([A, B, C], weights=[10, 30, 20])
    without = fedmerge.merge([average, B], "task_arithmetic", base=BASE, weights=[60, -30])
    want = fedmerge.merge([A, C], weights=[10, 20])
    torch.testing.assert_close(dict(without.named_parameters()), dict(want.named_parameters()), rtol=1e-4, atol=1e-5)


def test_weights_that_add_up_to_nothing_have_a_sum_and_no_mean():
    with pytest.raises(InvalidOption, match=r"add up to 0.*form=sum"):
        fedmerge.merge([A, B], "task_arithmetic", base=BASE, weights=[1, -1])
    difference = fedmerge.merge([A, B], "task_arithmetic", base=BASE, weights=[1, -1], form="sum")
    check(difference, (1.0, vector(A)), (-1.0, vector(B)))


def test_buffers_are_those_of_the_models_that_are_added():
    buffers = dict(fedmerge.merge([A, B], "task_arithmetic", base=BASE, weights=[1, -0.9]).named_buffers())
    assert all(torch.equal(buffers[n], b) for n, b in A.named_buffers())
    buffers = dict(fedmerge.merge([A], "task_arithmetic", base=BASE, weights=[-1]).named_buffers())
    assert all(torch.equal(buffers[n], b) for n, b in BASE.named_buffers())


@pytest.mark.parametrize("method", ABLE)
def test_methods_on_task_vectors_subtract(method):
    scale = {"magmax": 1.0}.get(method, 1.0)
    check(fedmerge.merge([A], method, base=BASE, weights=[-1], scale=scale), (-1.0, vector(A)))


@pytest.mark.parametrize("method", ["fedavg", "median", "slerp", "karcher", "soup", "fednova"])
def test_other_methods_refuse_and_name_those_that_can(method):
    with pytest.raises(BadUpdate, match=rf"client 1: .* -0\.5, and {method} subtracts no models\..*task_arithmetic"):
        fedmerge.merge([A, B], method, base=BASE, weights=[1, -0.5])
    able = {name for name, info in fedmerge.registry.entries("aggregator").items() if info.cls.allows_negative_weights}
    assert set(ABLE) <= able


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("-inf"), -1e300])
def test_a_weight_that_is_none_is_refused_all_the_same(weight):
    with pytest.raises(BadUpdate, match="client 1"):
        fedmerge.merge([A, B], "task_arithmetic", base=BASE, weights=[1, weight])


def test_a_client_of_a_federation_has_no_negative_number_of_examples():
    sent = [ClientUpdate(i, {"w": torch.ones(2)}, weight) for i, weight in enumerate((1.0, -1.0))]
    result = build_pipeline("task_arithmetic").merge(sent, MergeContext(base={"w": torch.zeros(2)}))
    assert result.accepted == (0,)
    assert [bad.client for bad in result.dropped] == [1]


def test_one_file_is_subtracted_from_its_base(tmp_path):
    files = {name: tmp_path / f"{name}.safetensors" for name in ("base", "a", "out")}
    base, trained = nn.Linear(2, 2), nn.Linear(2, 2)
    write_tensors(files["base"], base.state_dict())
    write_tensors(files["a"], trained.state_dict())
    settings = {"model": "torch.nn:Linear", "settings": ["model.in_features=2", "model.out_features=2"]}
    with pytest.raises(ConfigError, match="two or more, or one and the --base"):
        merge_files([files["a"]], files["out"], method="task_arithmetic", weights=[-1.0], **settings)
    merge_files([files["a"]], files["out"], method="task_arithmetic", weights=[-1.0], base=files["base"], **settings)
    torch.testing.assert_close(load_file(files["out"])["weight"], (2 * base.weight - trained.weight).detach())
