"""Models of unequal depth in one merge, at hand and in a federation."""

import json

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import BadUpdate, InvalidOption, ModelError
from fedmerge.models import build_model
from fedmerge.simulation import compare, make_config

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def mlp(*hidden, seed=0):
    return build_model("mlp", (6,), 3, seed=seed, hidden=list(hidden))


def outputs(model):
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize("shown", [{"example": X[:2]}, {"data": [X]}])
def test_a_shallow_model_alone_with_its_deeper_form_computes_what_it_did(shown):
    shallow = mlp(8)
    deep = mlp(8, 8)
    deep.layers[0].load_state_dict(shallow.layers[0].state_dict())
    deep.layers[2].load_state_dict(shallow.layers[1].state_dict())
    with torch.no_grad():
        deep.layers[1].weight.copy_(torch.eye(8))
        deep.layers[1].bias.zero_()
    merged = fedmerge.merge([shallow, deep], "clafusion", **shown)
    torch.testing.assert_close(outputs(merged), outputs(shallow), rtol=0, atol=1e-5)


def test_a_model_and_its_reordered_deeper_form_merge_to_its_function():
    shallow, order = mlp(8), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    deep = mlp(8, 8)
    with torch.no_grad():
        for layer, weight, bias in (
            (0, shallow.layers[0].weight[order], shallow.layers[0].bias[order]),
            (1, torch.eye(8), torch.zeros(8)),
            (2, shallow.layers[1].weight[:, order], shallow.layers[1].bias),
        ):
            deep.layers[layer].weight.copy_(weight)
            deep.layers[layer].bias.copy_(bias)
    torch.testing.assert_close(outputs(deep), outputs(shallow))
    merged = fedmerge.merge([shallow, deep], "clafusion", example=X[:2])
    torch.testing.assert_close(outputs(merged), outputs(shallow), rtol=0, atol=1e-5)


def test_of_one_depth_it_is_otfusion():
    models = [mlp(8, 7, seed=1), mlp(6, 5, seed=2)]
    one, other = (fedmerge.merge(models, method, example=X[:2]) for method in ("clafusion", "otfusion"))
    assert torch.equal(outputs(one), outputs(other))


def test_order_does_not_matter_and_the_result_is_as_deep_as_the_deepest():
    models = [mlp(6, seed=1), mlp(9, 8, 7, seed=2), mlp(5, 5, seed=3)]
    merged = fedmerge.merge(models, "clafusion", data=[X], weights=[1, 2, 3])
    assert len(merged.layers) == 4
    assert [len(model.layers) for model in models] == [2, 4, 3]
    again = fedmerge.merge(models[::-1], "clafusion", data=[X], weights=[3, 2, 1])
    torch.testing.assert_close(outputs(merged), outputs(again), rtol=1e-4, atol=1e-5)


def test_other_methods_take_models_of_one_depth():
    with pytest.raises(BadUpdate, match="is not in the model"):
        fedmerge.merge([mlp(6), mlp(6, 6)], "otfusion", example=X[:2])


def test_what_cannot_be_done_is_told():
    with pytest.raises(InvalidOption, match="pass data=, a list of batches, or example="):
        fedmerge.merge([mlp(6), mlp(6, 6)], "clafusion")
    smooth = [nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))]
    smooth += [nn.Sequential(*smooth[0][:2], nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))]
    with pytest.raises(ModelError, match=r"with the layers \['2'\] put in without effect"):
        fedmerge.merge(smooth, "clafusion", example=X[:2])


def test_clients_of_several_depths_in_a_federation(tmp_path):
    variants = [{"hidden": [12]}, {"hidden": [10, 12]}]
    settings = {
        "methods": ["clafusion"],
        "rounds": 2,
        "partition": {"clients": 3, "held_out": 0.1},
        "model": {"name": "mlp", "options": {"hidden": [12, 12]}, "variants": variants},
        "training": {"epochs": 2, "learning_rate": 0.05},
        "workers": 1,
    }
    done = compare(make_config(settings), tmp_path, lambda row: None)
    assert not done.failed
    rows = [json.loads(line) for line in (done.runs[0] / "rounds.jsonl").read_text().splitlines()]
    assert [row["clients_ok"] for row in rows[1:]] == [3, 3]
    assert not any(row["dropped"] for row in rows)
    assert rows[-1]["test_loss"] < rows[0]["test_loss"]
