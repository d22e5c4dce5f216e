"""Fisher merging against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmerge import BadUpdate, ClientUpdate, InvalidOption, MergeContext
from fedmerge.merging import build_pipeline
from tests.random_statistics import random_diagonal

WEIGHTS = (5.0, 1.0, 14.0)


def states(count=3):
    generator = torch.Generator().manual_seed(0)
    return [
        {"w": torch.randn(4, 3, generator=generator), "b": torch.randn(4, generator=generator)} for _ in range(count)
    ]


def merged(method, fishers, sent=None, **options):
    sent = sent or states(len(fishers))
    updates = [
        ClientUpdate(i, s, WEIGHTS[i], {"fisher_diag": f}) for i, (s, f) in enumerate(zip(sent, fishers, strict=True))
    ]
    return build_pipeline(method, {method: options}, on_bad_update="raise").merge(updates, MergeContext()).state


def average(sent):
    return {n: sum(w * s[n] for w, s in zip(WEIGHTS, sent, strict=False)) / sum(WEIGHTS[: len(sent)]) for n in sent[0]}


@pytest.mark.parametrize(
    ("method", "options"), [("fisher", {}), ("fedfisher", {"variant": "diag", "damping": 0.0, "normalize": 0.0})]
)
def test_the_formula(method, options):
    sent = states()
    fishers = [random_diagonal(s, i) for i, s in enumerate(sent)]
    got = merged(method, fishers, **options)
    for name in got:
        total = sum(w * f[name].double() for w, f in zip(WEIGHTS, fishers, strict=True))
        wanted = sum(w * f[name] * s[name].double() for w, f, s in zip(WEIGHTS, fishers, sent, strict=True)) / total
        torch.testing.assert_close(got[name].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("damping", [0.1, 2.0])
@pytest.mark.parametrize(("method", "options"), [("fisher", {}), ("fedfisher", {"variant": "diag", "normalize": 0.0})])
def test_damping_draws_to_the_average_in_units_of_each_tensors_mean_information(method, options, damping):
    sent = states()
    fishers = [random_diagonal(s, i) for i, s in enumerate(sent)]
    got = merged(method, fishers, damping=damping, **options)
    for name, mean in average(sent).items():
        weighed = [w * f[name].double().numpy() for w, f in zip(WEIGHTS, fishers, strict=True)]
        total = np.sum(weighed, 0)
        ridge = damping * total.mean()
        pulled = sum(f * s[name].double().numpy() for f, s in zip(weighed, sent, strict=True))
        np.testing.assert_allclose(got[name], (pulled + ridge * mean.numpy()) / (total + ridge), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [0.5, 1.0])
def test_information_is_divided_by_its_euclidean_norm_or_by_its_trace(normalize):
    """By a power of them: the first as in the paper, the second so that traces of factors compare."""
    sent = states()
    fishers = [{n: 10.0**i * t for n, t in random_diagonal(s, i).items()} for i, s in enumerate(sent)]
    rows = [np.concatenate([t.double().numpy().ravel() for t in f.values()]) for f in fishers]
    sizes = {"fisher": [np.sqrt((r**2).sum()) for r in rows], "fedfisher": [r.sum() for r in rows]}
    for method, variant in (("fisher", {}), ("fedfisher", {"variant": "diag"})):
        weights = [w / size**normalize for w, size in zip(WEIGHTS, sizes[method], strict=True)]
        got = merged(method, fishers, damping=0.0, normalize=normalize, **variant)
        for name, tensor in got.items():
            total = sum(w * f[name].double() for w, f in zip(weights, fishers, strict=True))
            moved = sum(w * f[name].double() * s[name] for w, f, s in zip(weights, fishers, sent, strict=True))
            torch.testing.assert_close(tensor.double(), moved / total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"normalize": 1.0}, {"damping": 0.5}])
@pytest.mark.parametrize("method", ["fisher", "fedfisher(variant=diag)"])
def test_equal_information_gives_fedavg_and_a_common_factor_changes_nothing(method, options):
    sent = states()
    one = random_diagonal(sent[0], 3)
    updates = [ClientUpdate(i, s, WEIGHTS[i], {"fisher_diag": one}) for i, s in enumerate(sent)]
    name = method.partition("(")[0]
    pipeline = build_pipeline(method, {name: options})
    torch.testing.assert_close(dict(pipeline.merge(updates, MergeContext()).state), average(sent))

    def scaled(factor):
        return [
            ClientUpdate(i, s, WEIGHTS[i], {"fisher_diag": {n: factor * f for n, f in random_diagonal(s, i).items()}})
            for i, s in enumerate(sent)
        ]

    small, large = (pipeline.merge(scaled(factor), MergeContext()).state for factor in (1e-20, 1e12))
    torch.testing.assert_close(small, large)


def test_information_of_one_client_alone_decides():
    sent = states()
    fishers = [random_diagonal(sent[0], 0), *({n: torch.zeros_like(t) for n, t in s.items()} for s in sent[1:])]
    got = merged("fisher", fishers, damping=0.0)
    torch.testing.assert_close(got, sent[0])


def test_without_information_it_is_the_average():
    sent = states()
    nothing = [{n: torch.zeros_like(t) for n, t in s.items()} for s in sent]
    torch.testing.assert_close(merged("fisher", nothing), average(sent))
    torch.testing.assert_close(merged("fisher", [{}, {}, {}]), average(sent))


def test_a_parameter_without_information_is_averaged():
    sent = states()
    got = merged("fisher", [{"b": random_diagonal(s, i)["b"]} for i, s in enumerate(sent)])
    torch.testing.assert_close(got["w"], average(sent)["w"])
    assert not torch.allclose(got["b"], average(sent)["b"])


def test_a_client_without_information_that_the_others_have_is_named():
    sent = states()
    fishers = [random_diagonal(s, i) for i, s in enumerate(sent)]
    del fishers[1]["w"]
    with pytest.raises(BadUpdate, match="'w' is missing") as caught:
        merged("fisher", fishers)
    assert caught.value.client == 1


def test_every_coordinate_stays_within_the_clients():
    sent = states()
    got = merged("fisher", [random_diagonal(s, i) for i, s in enumerate(sent)])
    for name, tensor in got.items():
        values = torch.stack([s[name] for s in sent])
        assert (tensor >= values.amin(0) - 1e-6).all()
        assert (tensor <= values.amax(0) + 1e-6).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f | {"w": torch.full((4, 3), torch.nan)}, "'w' has 12 of 12 entries NaN"),
        (lambda f: f | {"w": -f["w"]}, "negative"),
        (lambda f: f | {"w": f["w"][:2]}, r"shape \[2, 3\].*\[4, 3\]"),
        (lambda f: f | {"v": f["w"]}, "no parameter 'v'"),
    ],
)
def test_bad_information_is_named(change, words):
    sent = states()
    fishers = [random_diagonal(s, i) for i, s in enumerate(sent)]
    fishers[1] = change(fishers[1])
    with pytest.raises(BadUpdate, match=words) as caught:
        merged("fisher", fishers)
    assert caught.value.client == 1


@pytest.mark.parametrize("options", [{"damping": -1.0}, {"normalize": 1.5}, {"damping": float("inf")}])
def test_options_out_of_range(options):
    with pytest.raises(InvalidOption):
        build_pipeline("fisher", {"fisher": options})
