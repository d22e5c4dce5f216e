"""Model soups: uniform against the mean, greedy against scores that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge
from fedmerge import InvalidOption
from fedmerge.aggregators.soup import Soup
from tests.aggregators.golden_numbers import check_equal, drawn, merged


def judged(*places, **options):
    """The soup of models ``x -> w x`` at these places, judged by how far from 1 they are."""
    models = [nn.Linear(1, 1, bias=False) for _ in places]
    for model, place in zip(models, places, strict=True):
        nn.init.constant_(model.weight, place)
    data = [(torch.ones(4, 1), torch.ones(4, 1))]
    made = fedmerge.merge(models, "soup", data=data, task="regression", recipe="greedy", **options)
    return made.weight.item()


def test_the_uniform_soup_is_the_plain_mean_whatever_the_weights():
    states = [drawn(seed) for seed in range(3)]
    want = {n: np.mean([s[n] for s in states], 0) for n in states[0]}
    check_equal(merged(Soup(), states, [1.0, 50.0, 7.0]), want)


@pytest.mark.parametrize(
    ("places", "want"),
    [
        ((2.0,), 2.0),
        ((1.4, 0.8, 5.0), 1.1),  # 0.8 is best, 1.4 brings it to 1.1, and 5 would spoil it
        ((0.5, 0.75, 0.25), 0.75),  # no other improves on the best
        ((4.0, 0.5, 1.9), (0.5 + 1.9) / 2),
        ((0.0, 3.0, 2.0), 1.0),  # of 0 and 2, equally good, the first is taken first
    ],
)
def test_the_greedy_soup_takes_what_makes_it_better(places, want):
    assert judged(*places) == pytest.approx(want, abs=1e-6)
    assert abs(judged(*places) - 1) <= min(abs(place - 1) for place in places) + 1e-6


def test_a_model_that_leaves_the_score_as_it_is_enters_only_where_that_is_enough():
    """Classes by sign: every model is right in all."""
    models = [nn.Linear(1, 2, bias=False) for _ in range(2)]
    for model, place in zip(models, (1.0, 3.0), strict=True):
        model.weight.data = torch.tensor([[-place], [place]])
    data = [(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0]))]
    for accept, want in (("better", 1.0), ("as_good", 2.0)):
        made = fedmerge.merge(models, "soup", data=data, task="classification", recipe="greedy", accept=accept)
        assert made.weight[1].item() == want


def test_the_greedy_soup_asks_for_data_with_labels():
    models = [nn.Linear(1, 1), nn.Linear(1, 1)]
    with pytest.raises(InvalidOption, match="soup needs batches with labels on the server: pass data="):
        fedmerge.merge(models, "soup", recipe="greedy")
    with pytest.raises(InvalidOption, match=r"recipe = .best. is not valid"):
        fedmerge.merge(models, "soup", recipe="best")
    with pytest.raises(InvalidOption, match="accept"):
        Soup(accept="worse")
