"""FedFisher with Kronecker factors against dense linear algebra, and its laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmerge import BadUpdate, ClientUpdate, InvalidOption, MergeContext
from fedmerge.merging import build_pipeline
from tests.random_statistics import random_kfac

WEIGHTS = (5.0, 1.0, 14.0)
MATRICES = ("fc.weight", "conv.weight")
PAPER = {"damping": 0.0, "normalize": 0.0, "tolerance": 1e-10}


def states(count=3):
    generator = torch.Generator().manual_seed(1)
    shapes = {"fc.weight": (3, 4), "fc.bias": (3,), "conv.weight": (2, 3, 2, 2), "scale": (5,)}
    return [
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()} for _ in range(count)
    ]


def merged(sent, statistics, context=None, **options):
    updates = [
        ClientUpdate(i, s, WEIGHTS[i], {"fisher_kfac": k})
        for i, (s, k) in enumerate(zip(sent, statistics, strict=True))
    ]
    pipeline = build_pipeline("fedfisher", {"fedfisher": options}, on_bad_update="raise")
    return pipeline.merge(updates, context or MergeContext()).state


def average(sent):
    return {n: sum(w * s[n] for w, s in zip(WEIGHTS, sent, strict=True)) / sum(WEIGHTS) for n in sent[0]}


def matrix(state, weight):
    flat = state[weight].flatten(1).numpy()
    return np.hstack([flat, state["fc.bias"].numpy()[:, None]]) if weight == "fc.weight" else flat


def test_the_minimum_is_that_of_the_dense_quadratic():
    sent = states()
    factors = [random_kfac(s, i) for i, s in enumerate(sent)]
    got = merged(sent, factors, **PAPER)
    for weight in ("fc.weight", "conv.weight"):
        curvature, target = 0.0, 0.0
        for w, s, f in zip(WEIGHTS, sent, factors, strict=True):
            # Row-major vec: vec(G V A) = (G kron A) vec(V) for symmetric factors.
            fisher = w * np.kron(f[f"{weight}.G"].double().numpy(), f[f"{weight}.A"].double().numpy())
            curvature = curvature + fisher
            target = target + fisher @ matrix(s, weight).ravel()
        wanted = np.linalg.solve(curvature, target).reshape(matrix(sent[0], weight).shape)
        np.testing.assert_allclose(matrix(got, weight), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got["scale"], average(sent)["scale"])


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_gradient_vanishes(damping):
    sent = states()
    factors = [random_kfac(s, i) for i, s in enumerate(sent)]
    mean, got = average(sent), merged(sent, factors, damping=damping, normalize=0.0)
    for weight in ("fc.weight", "conv.weight"):
        pairs = [(f[f"{weight}.G"].double().numpy(), f[f"{weight}.A"].double().numpy()) for f in factors]
        shares = [w / sum(WEIGHTS) for w in WEIGHTS]
        unit = sum(p * np.diag(g).mean() * np.diag(a).mean() for p, (g, a) in zip(shares, pairs, strict=True))

        def gradient(x, weight=weight, pairs=pairs, shares=shares, unit=unit):
            pulls = [p * g @ (x - matrix(s, weight)) @ a for p, (g, a), s in zip(shares, pairs, sent, strict=True)]
            return np.linalg.norm(sum(pulls) + damping * unit * (x - matrix(mean, weight)))

        assert gradient(matrix(got, weight)) < 1e-6 * gradient(matrix(mean, weight))


@pytest.mark.parametrize("normalize", [0.0, 0.5, 1.0])
def test_what_has_a_diagonal_alone_counts_by_the_trace_of_the_whole_fisher_as_factors_do(normalize):
    sent = states()
    factors = [
        {n: 10.0**i * t if n.endswith("G") else t for n, t in random_kfac(s, i).items()} for i, s in enumerate(sent)
    ]
    diagonals = [np.random.default_rng(i).uniform(0.1, 1.0, 5) for i in range(3)]
    measured = [f | {"scale.diag": torch.from_numpy(d)} for f, d in zip(factors, diagonals, strict=True)]
    traces = [
        d.sum() + sum(np.trace(f[f"{weight}.A"].double()) * np.trace(f[f"{weight}.G"].double()) for weight in MATRICES)
        for f, d in zip(factors, diagonals, strict=True)
    ]
    weighed = [w / sum(WEIGHTS) * t**-normalize * d for w, t, d in zip(WEIGHTS, traces, diagonals, strict=True)]
    ridge = 0.3 * np.sum(weighed, 0).mean()
    pulled = (
        sum(d * s["scale"].numpy() for d, s in zip(weighed, sent, strict=True)) + ridge * average(sent)["scale"].numpy()
    )
    got = merged(sent, measured, damping=0.3, normalize=normalize)["scale"]
    np.testing.assert_allclose(got, pulled / (np.sum(weighed, 0) + ridge), rtol=1e-6)


@pytest.mark.parametrize("options", [{}, PAPER, {"damping": 3.0, "normalize": 1.0}])
def test_equal_fishers_give_fedavg(options):
    sent = states()
    one = random_kfac(sent[0], 4)
    torch.testing.assert_close(merged(sent, [one, one, one], **options), average(sent))


@pytest.mark.parametrize("options", [{}, {"damping": 0.0}])
def test_a_common_factor_on_all_fishers_changes_nothing(options):
    sent = states()
    factors = [random_kfac(s, i) for i, s in enumerate(sent)]

    def scaled(factor):
        return [{n: factor * t if n.endswith("G") else t for n, t in f.items()} for f in factors]

    torch.testing.assert_close(merged(sent, scaled(1e-12), **options), merged(sent, scaled(1e6), **options))


def test_strong_damping_leads_to_the_average():
    sent = states()
    factors = [random_kfac(s, i) for i, s in enumerate(sent)]
    torch.testing.assert_close(merged(sent, factors, damping=1e9), average(sent), rtol=1e-6, atol=1e-6)


def test_directions_that_no_client_measured_stay_at_the_average():
    sent = [{"fc.weight": s["fc.weight"]} for s in states()]
    first_input = torch.zeros(4, 4)
    first_input[0, 0] = 1.0
    factors = [{"fc.weight.A": (1 + i) * first_input, "fc.weight.G": torch.eye(3)} for i in range(3)]
    got, mean = merged(sent, factors, **PAPER)["fc.weight"], average(sent)["fc.weight"]
    torch.testing.assert_close(got[:, 1:], mean[:, 1:])
    shares = [w * (1 + i) for i, w in enumerate(WEIGHTS)]
    wanted = sum(w * s["fc.weight"][:, 0] for w, s in zip(shares, sent, strict=True)) / sum(shares)
    torch.testing.assert_close(got[:, 0], wanted)


def test_all_zero_factors_give_the_average():
    sent = states()
    nothing = [{n: torch.zeros_like(t) for n, t in random_kfac(s, 0).items()} for s in sent]
    torch.testing.assert_close(merged(sent, nothing), average(sent))


def test_factors_that_are_not_positive_semidefinite_are_named():
    sent = [{"fc.weight": s["fc.weight"]} for s in states()]
    wrong = torch.eye(4) + 3 * (torch.ones(4, 4) - torch.eye(4))  # eigenvalues 10 and -2
    factors = [{"fc.weight.A": torch.eye(4), "fc.weight.G": torch.eye(3) * (1 + i)} for i in range(3)]
    factors[1]["fc.weight.A"] = wrong
    with pytest.raises(BadUpdate, match="not positive semi-definite") as caught:
        merged(sent, factors, damping=0.0)
    assert caught.value.client == 1


def test_equal_clients_are_not_told_that_their_factors_are_bad(caplog):
    sent = [{n: torch.ones_like(t) for n, t in states()[0].items()}] * 2
    got = merged(sent, [random_kfac(s, i) for i, s in enumerate(sent)])
    assert "semidefinite" not in caplog.text
    for name, tensor in sent[0].items():
        torch.testing.assert_close(got[name], tensor)


def test_grouped_convolutions_are_solved_group_by_group():
    generator = torch.Generator().manual_seed(5)
    sent = [{"c.weight": torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)} for _ in range(3)]

    def positive(size):
        rows = torch.randn(2, 3 * size, size, generator=generator)
        return rows.transpose(1, 2) @ rows / len(rows)

    factors = [{"c.weight.A": positive(6), "c.weight.G": positive(2)} for _ in sent]
    got = merged(sent, factors, **PAPER)["c.weight"].reshape(2, 2, 6)
    for group in range(2):
        one = [{"c.weight": s["c.weight"].reshape(2, 2, 6)[group]} for s in sent]
        alone = [{n: t[group] for n, t in f.items()} for f in factors]
        torch.testing.assert_close(got[group], merged(one, alone, **PAPER)["c.weight"], rtol=1e-6, atol=1e-6)


def test_parameters_with_a_diagonal_only_are_weighted_by_it():
    sent = states()
    generator = torch.Generator().manual_seed(6)
    diagonals = [torch.rand(5, generator=generator) + 0.1 for _ in sent]
    factors = [random_kfac(s, i) | {"scale.diag": d} for i, (s, d) in enumerate(zip(sent, diagonals, strict=True))]
    got = merged(sent, factors, **PAPER)["scale"]
    total = sum(w * d.double() for w, d in zip(WEIGHTS, diagonals, strict=True))
    wanted = sum(w * d * s["scale"] for w, d, s in zip(WEIGHTS, diagonals, sent, strict=True)) / total
    torch.testing.assert_close(got, wanted)


def linear(state):
    module = torch.nn.Linear(4, 3)
    module.load_state_dict({n.removeprefix("fc."): t.float() for n, t in state.items()})
    return module


def test_early_stopping_takes_the_iterate_that_the_servers_data_like_best():
    sent = [{"weight": s["fc.weight"].float(), "bias": s["fc.bias"].float()} for s in states()]
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(200, 4, generator=generator)
    factors = [random_kfac(s, i) for i, s in enumerate(sent)]
    mean = {n: t.float() for n, t in average(sent).items()}
    labels = (x @ mean["weight"].T + mean["bias"]).argmax(1)  # the average is right on all of them
    context = MergeContext(data=[(x, labels)], model_fn=lambda: torch.nn.Linear(4, 3))
    torch.testing.assert_close(merged(sent, factors, context, early_stopping=True), mean)
    solved = merged(sent, factors)
    labels = (x @ solved["weight"].T + solved["bias"]).argmax(1)
    context = MergeContext(data=[(x, labels)], model_fn=lambda: torch.nn.Linear(4, 3))
    stopped = merged(sent, factors, context, early_stopping=True)
    assert (x @ stopped["weight"].T + stopped["bias"]).argmax(1).eq(labels).double().mean() > 0.97


@pytest.mark.parametrize("context", [MergeContext(), MergeContext(data=[torch.zeros(2, 4)])])
def test_early_stopping_says_what_it_lacks(context):
    sent = states()
    with pytest.raises(InvalidOption, match="data="):
        merged(sent, [random_kfac(s, i) for i, s in enumerate(sent)], context, early_stopping=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f | {"fc.weight.A": torch.full((5, 5), torch.nan)}, "fc.weight.A.*NaN"),
        (lambda f: f | {"fc.weight.A": torch.eye(7)}, r"factor A of 'fc.weight' has shape \[7, 7\].*4 or 5"),
        (lambda f: f | {"fc.weight.G": torch.eye(4)}, r"factor G of 'fc.weight' has shape \[4, 4\]"),
        (lambda f: f | {"fc.weight.A": -torch.eye(5)}, "negative diagonal"),
        (lambda f: f | {"fc.weight.A": torch.arange(25.0).reshape(5, 5)}, "not symmetric"),
        (lambda f: {n: t for n, t in f.items() if n != "fc.weight.G"}, "'fc.weight.G' is missing"),
        (lambda f: f | {"other.weight.A": torch.eye(2)}, "no weight matrix 'other.weight'"),
        (lambda f: f | {"fc.weight.B": torch.eye(2)}, "none of .A, .G and .diag"),
    ],
)
def test_bad_factors_are_named(change, words):
    sent = states()
    factors = [random_kfac(s, i) for i, s in enumerate(sent)]
    factors[2] = change(factors[2])
    with pytest.raises(BadUpdate, match=words) as caught:
        merged(sent, factors)
    assert caught.value.client == 2


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "full"},
        {"damping": -0.1},
        {"max_steps": 0},
        {"tolerance": 1.0},
        {"variant": "diag", "early_stopping": True},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(InvalidOption):
        build_pipeline("fedfisher", {"fedfisher": options})
