"""Heads, groups of convolutions and what crosses them, re-ordered in a copy: both merge to the function they have."""

from __future__ import annotations

import pytest
import torch

import fedmerge
from fedmerge.matching.assignment import Shared, assign_blocks
from fedmerge.matching.units import units
from fedmerge.permutations import trace
from tests.permutations.zoo_of_models import calibrate, difference, free_perms, permuted
from tests.permutations.zoo_of_wholes import MODELS

CROSSED = ("grouped_queries", "grouped_queries_unrotated", "one_key_unrotated", "normed_queries", "grouped_convolution")


def recovered(name, method, seed, copies=1, **options):
    model, batch = MODELS[name].make(seed)
    for data in options.get("data", ()):
        calibrate(model, data)  # norms are measured again after the merge, where there are data
    spec = trace(model, batch)
    moved = [permuted(model, spec, free_perms(spec, 10 * seed + i)) for i in range(copies)]
    assert all(difference(model, m, batch) < 1e-10 for m in moved)
    merged = fedmerge.merge([model, *moved], method, example=batch, **options)
    return difference(model, merged, batch)


@pytest.mark.parametrize("method", ["rebasin", "otfusion"])
@pytest.mark.parametrize("name", MODELS)
def test_by_weights(name, method):
    assert recovered(name, method, 1) < 1e-4


@pytest.mark.parametrize("method", ["c2m3", "gamf", "pfnm(class_aware=False,gamma=0.001)"])
@pytest.mark.parametrize("name", CROSSED)
def test_by_other_methods(name, method):
    assert recovered(name, method, 2) < 1e-4


@pytest.mark.parametrize("method", ["rebasin", "otfusion"])
@pytest.mark.parametrize("name", CROSSED)
def test_of_three_copies(name, method):
    assert recovered(name, method, 3, copies=2) < 1e-4


@pytest.mark.parametrize("method", ["rebasin", "otfusion"])
@pytest.mark.parametrize("name", ["grouped_queries", "grouped_convolution"])
def test_by_activations(name, method):
    batch = MODELS[name].make(1)[1]
    data = torch.randn(128, *batch.shape[1:], generator=torch.Generator().manual_seed(0))
    assert recovered(name, method, 1, ground="activations", data=[data]) < 1e-4


def test_crossings_are_the_positions_that_two_kinds_share():
    model, batch = MODELS["grouped_queries_unrotated"].make()
    (unit,) = [u for u in units(trace(model, batch)) if u.kinds]
    assert {(c.parameter, c.axis) for c in unit.crossings} == {("q.weight", 0), ("q.bias", 0), ("o.weight", 1)}
    places = next(c.places for c in unit.crossings if c.parameter == "q.weight")
    assert sorted(places.ravel().tolist()) == list(range(16))
    owned = {(s.parameter, s.axis) for sites in unit.kind_sites for s in sites}
    assert owned == {("k.weight", 0), ("k.bias", 0), ("v.weight", 0), ("v.bias", 0)}
    assert unit.sites == []
    assert not unit.simple


def test_kinds_that_cross_are_found_together():
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(2, 4, 5, 6, generator=generator)
    rows, columns, order = torch.tensor([2, 0, 3, 1]), torch.tensor([4, 2, 0, 1, 3]), torch.tensor([1, 0])
    theirs = ours[:, rows][:, :, columns][order]
    own = torch.randn(2, 5, 7, generator=generator)
    hint = torch.einsum("hdf,ief->hdie", own, own[:, columns][order])
    shared = Shared((0, 1), ours, theirs)
    outer, (found_rows, found_columns) = assign_blocks(
        torch.zeros(2, 2), [torch.zeros(2, 4, 2, 4, dtype=torch.float64), hint], [shared]
    )
    assert outer.tolist() == order.tolist()
    for place in range(2):
        assert torch.equal(theirs[outer[place]][found_rows[place]][:, found_columns[place]], ours[place])
