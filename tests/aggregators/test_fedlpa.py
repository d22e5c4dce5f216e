"""FedLPA against dense linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmerge import ClientUpdate, InvalidOption, MergeContext
from fedmerge.merging import build_pipeline
from tests.random_statistics import random_kfac

WEIGHTS = (5.0, 1.0, 14.0)
SHARES = [w / sum(WEIGHTS) for w in WEIGHTS]


def states(count=3):
    generator = torch.Generator().manual_seed(5)
    return [{"w": torch.randn(3, 4, generator=generator, dtype=torch.float64)} for _ in range(count)]


def merged(sent, factors, **options):
    pairs = enumerate(zip(sent, factors, strict=True))
    updates = [ClientUpdate(i, s, WEIGHTS[i], {"fisher_kfac": f}) for i, (s, f) in pairs]
    pipeline = build_pipeline("fedlpa", {"fedlpa": options}, on_bad_update="raise")
    return pipeline.merge(updates, MergeContext()).state["w"]


def measured(sent):
    return [{f"w.{n[-1]}": t for n, t in random_kfac({"weight": s["w"]}, i).items()} for i, s in enumerate(sent)]


def damped(factors, damping):
    unit = sum(p * np.diag(f).mean() for p, f in zip(SHARES, factors, strict=True))
    return [f + damping * unit * np.eye(len(f)) for f in factors]


@pytest.mark.parametrize(("inputs", "outputs"), [(0.0, 0.0), (0.3, 1.0), (0.0, 5.0)])
def test_the_mode_of_the_damped_posteriors(inputs, outputs):
    sent = states()
    factors = measured(sent)
    a = damped([f["w.A"].double().numpy() for f in factors], inputs)
    b = damped([f["w.G"].double().numpy() for f in factors], outputs)
    precision = sum(p * np.kron(g, x) for p, x, g in zip(SHARES, a, b, strict=True))
    target = sum(p * np.kron(g, x) @ s["w"].numpy().ravel() for p, x, g, s in zip(SHARES, a, b, sent, strict=True))
    wanted = np.linalg.solve(precision, target).reshape(3, 4)
    got = merged(sent, factors, damping_inputs=inputs, damping_outputs=outputs, tolerance=1e-12)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-6)


def test_equal_factors_and_strong_ridges_give_fedavg():
    sent = states()
    mean = sum(p * s["w"] for p, s in zip(SHARES, sent, strict=True))
    torch.testing.assert_close(merged(sent, [measured(sent)[0]] * 3), mean)
    ridges = {"damping_inputs": 1e9, "damping_outputs": 1e9}
    torch.testing.assert_close(merged(sent, measured(sent), **ridges), mean, rtol=1e-6, atol=1e-6)


def test_a_client_whose_gradients_vanished_still_counts_by_its_inputs():
    sent = states(2)
    factors = measured(sent)
    factors[0]["w.G"] = torch.zeros(3, 3)
    without = merged(sent, factors, damping_inputs=0.0, damping_outputs=0.0, tolerance=1e-12)
    torch.testing.assert_close(without, sent[1]["w"])
    assert (merged(sent, factors) - sent[1]["w"]).norm() > 0.1 * (sent[0]["w"] - sent[1]["w"]).norm()


def test_it_asks_for_factors_at_the_true_labels():
    (kind,) = build_pipeline("fedlpa").measured
    assert kind.estimator == "empirical"


@pytest.mark.parametrize("options", [{"damping_inputs": -1.0}, {"damping_outputs": -1.0}, {"max_steps": 0}])
def test_options_out_of_range(options):
    with pytest.raises(InvalidOption):
        build_pipeline("fedlpa", {"fedlpa": options})
