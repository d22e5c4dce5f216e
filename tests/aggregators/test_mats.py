"""MaTS: its start, its steps, and where they lead."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fedmerge import ClientUpdate, InvalidOption, MergeContext
from fedmerge.merging import build_pipeline
from tests.random_statistics import random_grams, random_kfac

WEIGHTS = (5.0, 1.0, 14.0)
MEASURE = {"kfac": ("fisher_kfac", random_kfac), "gram": ("gram", random_grams)}


def states(count=3):
    generator = torch.Generator().manual_seed(3)
    shapes = {"fc.weight": (3, 4), "fc.bias": (3,), "scale": (5,)}
    return [
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()} for _ in range(count)
    ]


def merged(sent, method, statistics, name, **options):
    updates = [ClientUpdate(i, s, WEIGHTS[i], {name: v}) for i, (s, v) in enumerate(zip(sent, statistics, strict=True))]
    return build_pipeline(method, {method: options}, on_bad_update="raise").merge(updates, MergeContext()).state


def average(sent):
    return {n: sum(w * s[n] for w, s in zip(WEIGHTS, sent, strict=True)) / sum(WEIGHTS) for n in sent[0]}


@pytest.mark.parametrize("curvature", MEASURE)
def test_no_step_is_the_average_and_equal_curvature_stays_there(curvature):
    name, draw = MEASURE[curvature]
    sent = states()
    values = [draw(s, i) for i, s in enumerate(sent)]
    torch.testing.assert_close(merged(sent, "mats", values, name, curvature=curvature, steps=0), average(sent))
    equal = [values[0]] * 3
    torch.testing.assert_close(merged(sent, "mats", equal, name, curvature=curvature), average(sent))


def test_many_steps_lead_to_the_undamped_minimum():
    sent = states()
    factors = [random_kfac(s, i) for i, s in enumerate(sent)]
    options = {"damping": 0.0, "normalize": 0.0, "tolerance": 1e-12}
    wanted = merged(sent, "fedfisher", factors, "fisher_kfac", **options)
    torch.testing.assert_close(merged(sent, "mats", factors, "fisher_kfac", steps=500), wanted)
    grams = [random_grams(s, i) for i, s in enumerate(sent)]
    wanted = merged(sent, "regmean", grams, "gram", shrinkage=1.0, ridge=0.0)
    torch.testing.assert_close(merged(sent, "mats", grams, "gram", curvature="gram", steps=500), wanted)


def test_every_step_lowers_the_quadratic():
    sent = states()
    factors = [random_kfac(s, i) for i, s in enumerate(sent)]

    def loss(state):
        total = 0.0
        for w, s, f in zip(WEIGHTS, sent, factors, strict=True):
            move = np.hstack([(state[n] - s[n]).numpy().reshape(3, -1) for n in ("fc.weight", "fc.bias")])
            a, g = (f[f"fc.weight.{side}"].double().numpy() for side in "AG")
            total += w * np.trace(move.T @ g @ move @ a)
        return total

    losses = [loss(merged(sent, "mats", factors, "fisher_kfac", steps=k)) for k in range(8)]
    assert all(after < before for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("options", [{"curvature": "diag"}, {"steps": -1}])
def test_options_out_of_range(options):
    with pytest.raises(InvalidOption):
        build_pipeline("mats", {"mats": options})
