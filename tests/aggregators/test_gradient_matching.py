"""Gradient matching against its formula, over rounds."""

from __future__ import annotations

import pytest
import torch

from fedmerge import ClientUpdate, InvalidOption, MergeContext
from fedmerge.merging import build_pipeline
from tests.random_statistics import random_diagonal

WEIGHTS = (5.0, 1.0, 14.0)
SHARES = [w / sum(WEIGHTS) for w in WEIGHTS]


def states(count=4):
    generator = torch.Generator().manual_seed(4)
    return [{"w": torch.randn(4, 3, generator=generator, dtype=torch.float64)} for _ in range(count)]


def to_updates(sent, fishers):
    pairs = enumerate(zip(sent, fishers, strict=True))
    return [ClientUpdate(i, s, WEIGHTS[i], {"fisher_diag": f}) for i, (s, f) in pairs]


def merged(base, sent, fishers, memory=None, **options):
    updates = [
        ClientUpdate(i, s, WEIGHTS[i], {"fisher_diag": f}) for i, (s, f) in enumerate(zip(sent, fishers, strict=True))
    ]
    pipeline = build_pipeline("gradient_matching", {"gradient_matching": options}, on_bad_update="raise")
    return pipeline.merge(updates, MergeContext(base=base), memory)


def fishers(sent):
    return [{n: t.double() for n, t in random_diagonal(s, i).items()} for i, s in enumerate(sent)]


@pytest.mark.parametrize(("scale", "delta", "keep"), [(1.0, 0.0, 1.0), (0.5, 0.2, 0.3), (2.0, 1e-6, 0.0)])
def test_three_rounds_by_the_formula(scale, delta, keep):
    base, *sent = states()
    h = [f["w"] for f in fishers(sent)]
    h_0, memory, theta_0 = torch.zeros(4, 3, dtype=torch.float64), None, base["w"]
    for _ in range(3):  # what was kept of the first counts in the third
        tau = [s["w"] - theta_0 for s in sent]
        mean = sum(p * x for p, x in zip(SHARES, h, strict=True))
        prior = h_0 + delta * (scale * mean).mean()
        total = prior + scale * mean
        theta = theta_0 + sum(scale * p * (prior + x) * t for p, x, t in zip(SHARES, h, tau, strict=True)) / total
        result = merged({"w": theta_0}, sent, fishers(sent), memory, scale=scale, delta=delta, keep=keep)
        torch.testing.assert_close(result.state["w"], theta)
        theta_0, memory, h_0 = theta, result.memory, keep * h_0 + mean


def test_the_first_round_is_fisher_merging():
    base, *sent = states()
    given = fishers(sent)
    updates = [
        ClientUpdate(i, s, WEIGHTS[i], {"fisher_diag": f}) for i, (s, f) in enumerate(zip(sent, given, strict=True))
    ]
    wanted = build_pipeline("fisher", {"fisher": {"damping": 0.0}}).merge(updates, MergeContext()).state
    torch.testing.assert_close(merged(base, sent, given, delta=0.0).state, wanted)


@pytest.mark.parametrize("case", ["equal", "no curvature", "large prior"])
def test_where_it_is_the_average(case):
    base, *sent = states()
    given = [fishers(sent)[0]] * 3 if case == "equal" else fishers(sent)
    if case == "no curvature":
        given = [{"w": 0 * f["w"]} for f in given]
    got = merged(base, sent, given, delta=1e12 if case == "large prior" else 0.0).state["w"]
    torch.testing.assert_close(got, sum(p * s["w"] for p, s in zip(SHARES, sent, strict=True)))


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"delta": -1.0}, {"keep": 1.1}])
def test_options_out_of_range(options):
    with pytest.raises(InvalidOption):
        build_pipeline("gradient_matching", {"gradient_matching": options})
