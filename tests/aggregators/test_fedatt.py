"""FedAtt against the paper's algorithm, written out in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedmerge import ClientUpdate, InvalidOption, MergeContext
from fedmerge.aggregators.fedatt import FedAtt

SHAPES = {
    "vector": (7,),
    "matrix": (5, 3),
    "wide": (3, 8),
    "kernel": (4, 2, 3, 3),
    "scalar": (),
    "none": (0,),
    "rowless": (0, 3),
    "columnless": (2, 0),
    "hollow": (2, 0, 3, 3),
}


def norm(d, kind):
    """Spectral norm of matrices, kernels as [out, in * k * k]; else the entry-wise 2-norm."""
    if d.ndim >= 2 and kind == "spectral":
        return np.linalg.norm(d.reshape(d.shape[0], math.prod(d.shape[1:])), ord=2) if d.size else 0.0
    return np.sqrt((d**2).sum())


def by_hand(base, clients, step_size, kind):
    merged = {}
    for name, w in base.items():
        s = np.array([norm(w - c[name], kind) for c in clients])
        e = np.exp(s - s.max())
        merged[name] = w - step_size * sum(a * (w - c[name]) for a, c in zip(e / e.sum(), clients, strict=True))
    return merged


def federation(scale):
    draw = np.random.default_rng(0)
    base = {name: draw.normal(size=shape) for name, shape in SHAPES.items()}
    return base, [{n: w + scale * draw.normal(size=w.shape) for n, w in base.items()} for _ in range(4)]


def merge(base, clients, *, weights=(1.0, 2.0, 3.0, 4.0), seed=0, round=1, **options):
    states = [{n: torch.tensor(w) for n, w in c.items()} for c in clients]
    updates = [ClientUpdate(i, state, weights[i]) for i, state in enumerate(states)]
    context = MergeContext(base={n: torch.tensor(w) for n, w in base.items()}, seed=seed, round=round)
    return FedAtt(**options).merge(updates, context, {})[0]


@pytest.mark.parametrize("kind", ["spectral", "frobenius"])
@pytest.mark.parametrize("step_size", [0.0, 1.0, 1.2])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_merge_is_the_papers_algorithm(kind, step_size, scale):
    base, clients = federation(scale)
    merged = merge(base, clients, norm=kind, step_size=step_size)
    for name, want in by_hand(base, clients, step_size, kind).items():
        np.testing.assert_allclose(merged[name].numpy(), want, rtol=1e-6, atol=1e-9 * scale, err_msg=name)


def test_far_clients_in_single_precision():
    base, clients = federation(1e3)
    single = [{n: w.astype(np.float32) for n, w in c.items()} for c in [base, *clients]]
    merged = merge(single[0], single[1:], step_size=1.0)
    for name, want in by_hand(base, clients, 1.0, "spectral").items():
        assert merged[name].dtype == torch.float32
        np.testing.assert_allclose(merged[name].numpy(), want, rtol=1e-4, atol=1e-2, err_msg=name)


def test_no_step_leaves_the_model():
    base, clients = federation(1.0)
    for name, tensor in merge(base, clients, step_size=0.0).items():
        assert torch.equal(tensor, torch.tensor(base[name])), name


def test_examples_play_no_part():
    base, clients = federation(1.0)
    one, two = merge(base, clients), merge(base, clients, weights=[900.0, 1.0, 5.0, 70.0])
    assert all(torch.equal(one[name], two[name]) for name in base)


def test_the_two_norms_differ():
    base, clients = federation(1.0)
    assert not torch.allclose(merge(base, clients)["matrix"], merge(base, clients, norm="frobenius")["matrix"])


def test_the_farther_client_counts_more():
    base = {"w": np.zeros(2)}
    merged = merge(base, [{"w": np.array([1.0, 0.0])}, {"w": np.array([0.0, 3.0])}], step_size=1.0)["w"]
    weights = np.exp([1.0, 3.0]) / np.exp([1.0, 3.0]).sum()
    np.testing.assert_allclose(merged.numpy(), [weights[0], 3 * weights[1]])


def test_equal_distances_give_the_plain_mean():
    base = {"w": np.zeros(3)}
    clients = [{"w": row} for row in np.eye(3)]
    np.testing.assert_allclose(merge(base, clients, step_size=1.0)["w"].numpy(), np.full(3, 1 / 3))


def test_noise_has_the_deviation_asked_for_and_follows_the_seed():
    base = {"w": np.zeros(20_000), "v": np.zeros(20_000)}
    clients = [base, base]
    noisy = merge(base, clients, noise=0.5)
    assert noisy["w"].std().item() == pytest.approx(0.5, rel=0.03)
    assert not torch.equal(noisy["w"], noisy["v"])
    assert torch.equal(noisy["w"], merge(base, clients, noise=0.5)["w"])
    assert not torch.equal(noisy["w"], merge(base, clients, noise=0.5, seed=1)["w"])
    assert not torch.equal(noisy["w"], merge(base, clients, noise=0.5, round=2)["w"])
    reversed_names = merge(dict(reversed(base.items())), clients[:1] * 2, noise=0.5)
    assert all(torch.equal(noisy[name], reversed_names[name]) for name in base)


@pytest.mark.parametrize("options", [{"norm": "l1"}, {"step_size": -1.0}, {"noise": -0.1}])
def test_options_out_of_range(options):
    with pytest.raises(InvalidOption, match=next(iter(options))):
        FedAtt(**options)
