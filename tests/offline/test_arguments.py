"""What a person may get wrong in a call ends in an error of ours that says what to do."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import DataError, FedMergeError, InvalidOption, ModelError, TaskError, UnknownName

X, Y = torch.randn(6, 4), torch.arange(6) % 3


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def diverged():
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    return model


class Broken:
    def __iter__(self):
        raise KeyError("a loader's own error")

    def __len__(self):
        return 2


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return X[i], Y[i]


def call(method="fedavg", models=None, **given):
    return fedmerge.merge([net(), net()] if models is None else models, method, **given)


MISTAKES = {
    "one module": (lambda: call(models=net()), InvalidOption, "pass a list of two or more"),
    "state_dicts": (lambda: call(models=[net().state_dict()] * 2), InvalidOption, "load_state_dict"),
    "file names": (lambda: call(models=["a.pt", "b.pt"]), InvalidOption, "load the file into a module"),
    "a path": (lambda: call(models=Path("a.pt")), InvalidOption, "list of modules"),
    "a class": (lambda: call(models=[nn.Linear, nn.Linear]), InvalidOption, "the class Linear"),
    "a mapping": (lambda: call(models={"a": net()}), InvalidOption, "list(models.values())"),
    "nothing": (lambda: call(models=[]), InvalidOption, "no model to merge"),
    "None": (lambda: call(models=[net(), None]), InvalidOption, "models[1] must be a module, got None"),
    "one weight": (lambda: call(weights=0.5), InvalidOption, "one entry per model (2)"),
    "weights in words": (lambda: call(weights=["1", "2"]), InvalidOption, "weights[0] must be a number"),
    "weights by name": (lambda: call(weights={"a": 1, "b": 2}), InvalidOption, "list with one entry per model"),
    "too few weights": (lambda: call(weights=[1]), InvalidOption, "1 entries for 2 models"),
    "a misspelt keyword": (lambda: call(weigths=[1, 2]), UnknownName, "Did you mean 'weights'"),
    "a misspelt option": (lambda: call("otfusion", sovler="emd"), UnknownName, "Did you mean 'solver'"),
    "a step's option": (
        lambda: call("fedavg+server_adam", base=net(), learning_rate=0.1),
        UnknownName,
        "server_adam(learning_rate=...)",
    ),
    "a misspelt method": (lambda: call("fedvag"), UnknownName, "Did you mean 'fedavg'"),
    "no method": (lambda: call(None), InvalidOption, "fedmerge.methods()"),
    "a function for a method": (lambda: call(torch.mean), InvalidOption, "method must be a name"),
    "a base's state": (lambda: call(base=net().state_dict()), InvalidOption, "load_state_dict"),
    "a base's file": (lambda: call(base="base.pt"), InvalidOption, "load the file into a module"),
    "a base of NaN": (lambda: call(base=diverged()), ModelError, "base: tensor '0.weight' has 1 of 20 entries NaN"),
    "a client's labels": (
        lambda: call("fisher", clients=[[(X, Y)], [(X, Y + 7)]]),
        TaskError,
        "clients[1]: labels must be whole numbers from 0 to 2",
    ),
    "an example and its label": (lambda: call("rebasin", example=[X, Y]), InvalidOption, "pass the inputs alone"),
    "an example in words": (lambda: call("rebasin", example="x"), InvalidOption, "example must be a batch"),
    "one number for an example": (lambda: call("rebasin", example=torch.tensor(1.0)), InvalidOption, "[n, ...]"),
    "no example": (lambda: call("rebasin"), InvalidOption, "example="),
    "an example of another size": (lambda: call("rebasin", example=torch.zeros(2, 9)), ModelError, "export"),
    "triples": (lambda: call("regmean", clients=[[(X, Y, Y)]] * 2), DataError, "clients[0], batch 0 is of 3 parts"),
    "mappings": (lambda: call("regmean", clients=[[{"x": X}]] * 2), DataError, "is a mapping (x)"),
    "bare inputs": (lambda: call("regmean", clients=[[X]] * 2), DataError, "batches are pairs"),
    "a data set": (lambda: call("regmean", clients=[Pairs()] * 2), InvalidOption, "DataLoader(dataset, 64)"),
    "too few labels": (lambda: call("regmean", clients=[[(X, Y[:4])]] * 2), DataError, "one target for each"),
    "a loader that fails": (lambda: call("regmean", clients=[Broken()] * 2), DataError, "KeyError"),
    "no batches": (lambda: call("regmean", clients=[[]] * 2), InvalidOption, "clients[0] has no batches"),
    "one loader": (lambda: call("regmean", clients=[[(X, Y)]]), InvalidOption, "1 entries for 2 models"),
    "inputs that do not fit": (lambda: call("regmean", clients=[[(X[:, :3], Y)]] * 2), ModelError, "does not run on"),
    "statistics in words": (lambda: call("regmean", statistics=["a", "b"]), InvalidOption, "compute_statistics"),
    "data in words": (lambda: call("zipit", data="abc"), InvalidOption, "data must give batches"),
    "privacy in words": (lambda: call(privacy="noise"), InvalidOption, "Privacy(...)"),
    "repair misspelt": (lambda: call(repair="rescal"), InvalidOption, '"rescale"'),
    "a seed in words": (lambda: call(seed="one"), InvalidOption, "seed must be a whole number"),
    "a statistic misspelt": (
        lambda: fedmerge.compute_statistics(net(), [(X, Y)], ["grams"]),
        UnknownName,
        "Did you mean 'gram'",
    ),
    "no statistic": (lambda: fedmerge.compute_statistics(net(), [(X, Y)], None), InvalidOption, "'gram'"),
    "a state measured": (
        lambda: fedmerge.compute_statistics(net().state_dict(), [(X, Y)], ["gram"]),
        InvalidOption,
        "model must be a module",
    ),
    "triples measured": (
        lambda: fedmerge.compute_statistics(net(), [(X, Y, Y)], ["gram"]),
        DataError,
        "loader, batch 0",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_line_that_helps(mistake):
    make, kind, words = MISTAKES[mistake]
    with pytest.raises(kind) as caught:
        make()
    assert words in str(caught.value)
    assert "failed:" not in str(caught.value)  # foreseen, rather than caught


NONSENSE = {
    "None": None, "a number": -1, "half": 0.5, "text": "abc", "bytes": b"ab", "empty": [], "mapping": {"a": 1},
    "Nones": [None, None], "texts": ["a", "b"], "object": object(), "class": nn.Linear, "tensor": torch.zeros(2, 4),
    "scalar": torch.tensor(1.0), "array": np.array([None, "a"], dtype=object), "function": lambda *a: 1, "set": {1, 2},
    "nested": [[[]], [[]]], "modules": [nn.Linear(2, 2), nn.Linear(3, 3)], "broken": Broken(), "huge": 10**400,
    "labels": [[(X, Y + 7)], [(X, Y - 100)]], "floats": [[(X, torch.randn(6))]] * 2, "NaN": [[(X * torch.nan, Y)]] * 2,
}  # fmt: skip
ARGUMENTS = [
    "models",
    "method",
    "weights",
    "base",
    "statistics",
    "data",
    "clients",
    "example",
    "repair",
    "privacy",
    "trust",
    "seed",
]


@pytest.mark.parametrize("method", ["fedavg", "otfusion", "fedfisher", "fedavg+ridge_head"])
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_nonsense_anywhere_ends_in_an_error_of_ours(argument, method):
    good = {"models": [net(), net()], "method": method, "clients": [[(X, Y)]] * 2, "example": X, "base": net()}
    for value in NONSENSE.values():
        try:
            fedmerge.merge(**{**good, argument: copy.copy(value)})
        except FedMergeError:
            continue


def test_what_is_unusual_and_right_is_taken():
    a, b = net(), net()
    wanted = (a[0].weight * 3 + b[0].weight) / 4
    for models, weights in (
        ((model for model in (a, b)), [3, 1]),
        ((a, b), np.array([3, 1])),
        (nn.ModuleList([a, b]), torch.tensor([3.0, 1.0])),
        ([a, b], (3, np.float32(1))),
    ):
        torch.testing.assert_close(fedmerge.merge(models, weights=weights)[0].weight, wanted)


def test_batches_come_in_many_forms():
    models = [net(), net()]
    torch.manual_seed(0)
    wanted = fedmerge.merge(models, "regmean", clients=[[(X, Y)]] * 2)[2].weight
    data = torch.utils.data.TensorDataset(X, Y)
    loader = torch.utils.data.DataLoader(data, 6)
    for given in ((X, Y), [[X, Y]], [(X.numpy(), Y.numpy())], iter([(X, Y)]), loader):
        found = fedmerge.merge(models, "regmean", clients=[given, [(X, Y)]])
        torch.testing.assert_close(found[2].weight, wanted)
