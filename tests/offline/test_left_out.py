"""Merging a part of a model: what is left out comes from one model, stays in place, and may differ in shape."""

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import BadUpdate, InvalidOption, ModelError, UnknownName
from fedmerge.permutations import trace

X = torch.randn(16, 5, generator=torch.Generator().manual_seed(3))
KEPT_APART = ["fedavg", "fisher", "regmean", "median", "krum", "fedfisher(variant=kfac)", "fednova", "slerp", "ties"]


class Net(nn.Module):
    """A body with a norm, and a head of any size."""

    def __init__(self, classes=3, hidden=8, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(5, hidden), nn.ReLU(), nn.Linear(hidden, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, classes)
        with torch.no_grad():
            self.body[3].running_mean.normal_()

    def forward(self, x):
        return self.head(self.body(x))


class Named(Net):
    """The same with a head of another name and kind."""

    def __init__(self, **options):
        super().__init__(**options)
        del self.head
        self.outputs = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        return self.outputs(self.body(x))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def body_of(state):
    return {name: tensor for name, tensor in state.items() if name.startswith("body")}


def loader(classes, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(24) % classes
    return [(torch.randn(24, 5, generator=generator), labels)]


def shuffled(model, perms_seed):
    """The model, and one that computes the same with its hidden neurons in another order."""
    spec = trace(model, X)
    other = Net()
    other.load_state_dict(spec.apply(state_of(model), spec.random(torch.Generator().manual_seed(perms_seed))))
    assert not torch.equal(other.head.weight, model.head.weight)
    torch.testing.assert_close(other.eval()(X), model.eval()(X))
    return other


def test_only_and_leave_out_name_the_same_part():
    models = [Net(seed=1), Net(seed=2)]
    whole = state_of(fedmerge.merge(models, weights=[3, 1]))
    first = state_of(models[0])
    for given in ({"only": ["body.*"]}, {"only": ["body"]}, {"leave_out": ["head"]}, {"leave_out": ["head.*"]}):
        merged = state_of(fedmerge.merge(models, weights=[3, 1], **given))
        assert same(body_of(merged), body_of(whole))
        assert torch.equal(merged["head.weight"], first["head.weight"])
    both = state_of(fedmerge.merge(models, weights=[3, 1], only=["body"], leave_out=["body.0"]))
    assert torch.equal(both["body.0.weight"], first["body.0.weight"])
    assert torch.equal(both["body.2.weight"], whole["body.2.weight"])


def test_buffers_go_with_the_parameters_of_their_layer():
    models = [Net(seed=1), Net(seed=2)]
    whole, first = state_of(fedmerge.merge(models)), state_of(models[0])
    for given in ({"leave_out": ["body.3.weight", "body.3.bias"]}, {"only": ["body.0", "body.2", "head"]}):
        merged = fedmerge.merge(models, **given)
        assert torch.equal(merged.body[3].running_mean, first["body.3.running_mean"])
    named = fedmerge.merge(models, leave_out=["body.3.running_*"])
    assert torch.equal(named.body[3].running_mean, first["body.3.running_mean"])
    assert torch.equal(named.body[3].weight, whole["body.3.weight"])


@pytest.mark.parametrize("method", KEPT_APART)
def test_heads_of_other_sizes_are_kept_apart(method):
    models, classes = [Net(2, seed=1), Net(4, seed=2)], (2, 4)
    before = [state_of(model) for model in models]
    given = {"clients": [loader(k, i) for i, k in enumerate(classes)]} if method != "fednova" else {}
    if method == "fednova":
        given["statistics"] = [{"local_steps": 3, "momentum": 0.0}, {"local_steps": 5, "momentum": 0.0}]
    given["base"] = Net(3, seed=5)
    if method == "krum":
        models, classes = [*models, Net(2, seed=3)], (2, 4, 2)
        given["clients"] = [loader(k, i) for i, k in enumerate(classes)]
    merged = fedmerge.merge(models, method, leave_out=["head.*"], **given)
    assert torch.equal(merged.head.weight, before[0]["head.weight"])
    if method != "krum":  # which takes one model
        assert not torch.equal(merged.body[0].weight, before[0]["body.0.weight"])
    # The body does not depend on what the heads are, but for what is measured through them.
    if method in ("fedavg", "median", "slerp", "ties", "fednova"):
        alike = [Net(2, seed=1), Net(2, seed=2)]
        for one, state in zip(alike, before, strict=True):
            one.load_state_dict({**one.state_dict(), **body_of(state)})
            one.head.load_state_dict(models[0].head.state_dict())
        given["base"] = Net(2, seed=5)
        given["base"].load_state_dict({**models[0].state_dict(), **body_of(Net(3, seed=5).state_dict())})
        given.pop("clients", None)
        reference = fedmerge.merge(alike, method, leave_out=["head.*"], **given)
        for name, tensor in body_of(reference.state_dict()).items():
            torch.testing.assert_close(merged.state_dict()[name], tensor)
    for model, state in zip(models, before, strict=False):
        assert same(state_of(model), state)


def test_statistics_of_whole_models_will_do():
    models = [Net(2, seed=1), Net(4, seed=2)]
    loaders = [loader(2, 0), loader(4, 1)]
    for method, name in (("fisher", "fisher_diag"), ("regmean", "gram")):
        whole = [fedmerge.compute_statistics(m, one, [name]) for m, one in zip(models, loaders, strict=True)]
        assert any(entry.startswith("head") for entry in whole[0][name])
        told = fedmerge.merge(models, method, leave_out=["head"], statistics=whole)
        asked = fedmerge.merge(models, method, leave_out=["head"], clients=loaders)
        for key, tensor in told.state_dict().items():
            torch.testing.assert_close(asked.state_dict()[key], tensor)


def test_heads_of_other_kinds_and_names():
    models = [Net(2, seed=1), Named(seed=2)]
    merged = fedmerge.merge(models, leave_out=["head", "outputs"])
    torch.testing.assert_close(merged.body[0].weight, (models[0].body[0].weight + models[1].body[0].weight) / 2)
    assert torch.equal(merged.head.weight, models[0].head.weight)
    second = fedmerge.with_part(merged, models[1], ["outputs", "head"])
    assert isinstance(second, Named)
    torch.testing.assert_close(second.eval()(X), models[1].eval().outputs(merged.eval().body(X)))


@pytest.mark.parametrize("method", ["rebasin", "otfusion", "c2m3", "fedma(class_aware=false)", "gamf"])
def test_neurons_that_a_left_out_tensor_holds_stay_in_place(method):
    model = Net(seed=1)
    other = shuffled(model, 4)
    # Without its own head, which the other order of neurons is hidden in, the copy computes something else.
    pinned = fedmerge.merge([model, other], method, leave_out=["head"], example=X)
    free = fedmerge.merge([model, other], method, example=X)
    torch.testing.assert_close(free.eval()(X), model(X), rtol=1e-3, atol=1e-3)
    assert torch.equal(pinned.head.weight, model.head.weight)
    assert (pinned.eval()(X) - model(X)).abs().max() > 1e-2

    # Where neurons before the head are in one order, the others may be in any: heads put back compute as before.
    spec = trace(model, X)
    before_head = next(i for i, g in enumerate(spec.groups) if any(s.parameter == "head.weight" for s in g.sites))
    perms = list(spec.random(torch.Generator().manual_seed(9)))
    perms[before_head] = torch.arange(6)
    inner = Net()
    inner.load_state_dict(spec.apply(state_of(model), perms))
    assert not torch.equal(inner.body[0].weight, model.body[0].weight)
    inner.head = nn.Linear(6, 7)
    merged = fedmerge.merge([model, inner], method, leave_out=["head"], example=X)
    torch.testing.assert_close(merged.eval()(X), model(X), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        fedmerge.with_part(merged, inner, ["head"]).eval()(X), inner.eval()(X), rtol=1e-3, atol=1e-3
    )


def test_hidden_widths_may_still_differ_behind_what_is_left_out():
    merged = fedmerge.merge([Net(2, 8), Net(4, 10, seed=1)], "otfusion", leave_out=["head"], example=X)
    assert merged(X).shape == (16, 2)
    assert fedmerge.with_part(merged, Net(4, 10, seed=1), ["head"])(X).shape == (16, 4)


def test_the_rest_may_come_from_the_base():
    models, base = [Net(2, seed=1), Net(4, seed=2)], Net(5, seed=3)
    merged = fedmerge.merge(models, "task_arithmetic", leave_out=["head"], base=base, left_from="base")
    assert torch.equal(merged.head.weight, base.head.weight)
    assert merged(X).shape == (16, 5)
    bare = Net(seed=3)
    del bare.head
    models[0].head.requires_grad_(False)
    merged = fedmerge.merge(models, "task_arithmetic", leave_out=["head"], base=bare)
    assert torch.equal(merged.head.weight, models[0].head.weight)
    assert not merged.head.weight.requires_grad
    with pytest.raises(InvalidOption, match=r"the base has no 'head\.bias'"):
        fedmerge.merge(models, "task_arithmetic", leave_out=["head"], base=bare, left_from="base")


def test_a_buffer_of_the_whole_model_is_neither_among_what_is_named():
    models = [Net(seed=1), Net(seed=2)]
    for i, model in enumerate(models):
        model.register_buffer("position_ids", torch.arange(4 + i))
    merged = fedmerge.merge(models, only=["body.*"])
    assert torch.equal(merged.position_ids, torch.arange(4))
    assert torch.equal(merged.body[3].running_mean, fedmerge.merge(models, leave_out=["pos*"]).body[3].running_mean)
    models[1].position_ids = models[0].position_ids + 1
    with pytest.raises(ModelError, match=r"'position_ids' .* leave it out"):
        fedmerge.merge(models, leave_out=["head"])


def test_shared_tensors_are_left_out_under_all_their_names():
    def tied(vocabulary, seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Embedding(vocabulary, 4), nn.Linear(4, 4), nn.Linear(4, vocabulary, bias=False))
        model[2].weight = model[0].weight
        return model

    models = [tied(6, 0), tied(9, 1)]
    merged = fedmerge.merge(models, leave_out=["2"])
    assert merged[0].weight is merged[2].weight
    assert torch.equal(merged[0].weight, models[0][0].weight)
    torch.testing.assert_close(merged[1].weight, (models[0][1].weight + models[1][1].weight) / 2)


def test_what_cannot_be_left_out_is_told():
    models = [Net(2, seed=1), Net(4, seed=2)]
    with pytest.raises(UnknownName, match=r"leave_out 'hed.weight'. Did you mean 'head.weight'"):
        fedmerge.merge(models, leave_out=["hed.weight"])
    with pytest.raises(UnknownName, match="tensor in only"):
        fedmerge.merge(models, only=["encoder.*"])
    for given, words in (
        ({"leave_out": "head.*"}, "leave_out must be a list"),
        ({"only": []}, "merges nothing"),
        ({"leave_out": ["*"]}, "leaves nothing to merge"),
        ({"only": ["head"], "leave_out": ["head"]}, "leaves nothing to merge"),
        ({"leave_out": ["head"], "left_from": "last"}, "left_from must be"),
        ({"leave_out": ["head"], "left_from": "base"}, "pass base="),
        ({"left_from": "base", "base": Net()}, "what is left out"),
    ):
        with pytest.raises(InvalidOption, match=words):
            fedmerge.merge(models, **given)
    with pytest.raises(BadUpdate, match="head"):  # left in, they still do not fit
        fedmerge.merge(models, leave_out=["body.0"])
    loaders = [loader(2, 0), loader(4, 1)]
    with pytest.raises(InvalidOption, match=r"'head\.bias', which is left out"):
        fedmerge.merge(models, "fedma", leave_out=["head"], clients=loaders, example=X)
    twins = [Net(2, seed=1), Net(2, seed=2)]
    twins[1].head.load_state_dict(twins[0].head.state_dict())
    asked = fedmerge.merge(twins, "fedavg+recalibrate", leave_out=["head"], clients=[loader(2, 0), loader(2, 1)])
    assert torch.equal(asked.head.weight, twins[0].head.weight)


def test_parts_that_do_not_fit_are_told():
    merged = fedmerge.merge([Net(2, seed=1), Named(seed=2)], leave_out=["head", "outputs"])
    with pytest.raises(ModelError, match=r"has no 'outputs\.0\.weight'"):
        fedmerge.with_part(merged, Named(), ["body.0"])
    with pytest.raises(ModelError, match=r"model has no 'head\.weight'"):
        fedmerge.with_part(merged, Named(), ["outputs"])
    with pytest.raises(UnknownName, match="patterns"):
        fedmerge.with_part(merged, Named(), ["tail"])
