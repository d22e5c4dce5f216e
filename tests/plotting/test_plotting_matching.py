from __future__ import annotations

import doctest
import importlib
import math

import numpy as np
import pytest
import torch

from fedmerge.diagnostics import Barrier, MatchingCosts, Similarity
from fedmerge.errors import InvalidOption
from fedmerge.models import build_model
from fedmerge.permutations import PermutationSpec, trace
from fedmerge.plotting import plot_barrier, plot_costs, plot_matching, plot_permutations, plot_similarity
from fedmerge.plotting.permutation_graph import cells

LINES = {
    "as trained": Barrier((0.0, 0.5, 1.0), (0.1, 2.1, 0.1), (0.97, 0.4, 0.97)),
    "matched": Barrier((0.0, 0.5, 1.0), (0.1, 0.15, 0.1), (0.97, 0.95, 0.97)),
}
COSTS = MatchingCosts(("conv1.weight", "model.encoder.blocks.11.attention.output.weight"), (1.0, 0.9), (0.5, math.nan))
ONES = torch.ones(2, 3, 3, dtype=torch.float64)
SIMILARITY = Similarity(("conv1.weight", "linear.0.weight"), 0.9 * ONES, -0.1 * ONES)


@pytest.mark.parametrize("module", ["barrier", "changes", "permutation_graph"])
def test_examples_run(module):
    assert doctest.testmod(importlib.import_module(f"fedmerge.plotting.{module}")).failed == 0


def test_every_picture_is_drawn_into_a_folder_under_its_name(tmp_path):
    model = build_model("lenet", (1, 28, 28), 10, seed=0)
    spec = trace(model, torch.zeros(2, 1, 28, 28))
    drawn = [
        plot_barrier(LINES, tmp_path),
        plot_matching(LINES, COSTS, tmp_path),
        plot_costs(COSTS, tmp_path),
        plot_similarity(SIMILARITY, SIMILARITY, tmp_path, pair=(0, 2)),
        plot_permutations(spec, spec.random(), tmp_path),
    ]
    names = ["barrier", "matching", "matching-costs", "similarity", "permutations"]
    assert drawn == [tmp_path / f"{name}.png" for name in names]
    assert all(path.stat().st_size > 5_000 for path in drawn)
    assert len(list(tmp_path.iterdir())) == len(drawn)


def svg(path):
    return path.read_text()


def test_pictures_say_what_they_show(tmp_path):
    text = svg(plot_matching(LINES, COSTS, tmp_path / "m.svg"))
    for words in (
        "as trained: barrier 2",
        "matched: barrier 0.05",
        "conv1.weight",
        "…blocks.11.attention.output.weight",
    ):
        assert words in text
    text = svg(plot_similarity(SIMILARITY, SIMILARITY, tmp_path / "s.svg"))
    assert "linear CKA" in text
    assert text.count("linear.0.weight") == 1
    spec = trace(build_model("mlp", (4,), 2, seed=0, hidden=[50, 6]), torch.zeros(2, 4))
    text = svg(plot_permutations(spec, [torch.arange(50), torch.tensor([1, 0, 2, 3, 5, 4])], tmp_path / "p.svg"))
    assert "50 neurons, 50 stay" in text
    assert "6 neurons, 2 stay" in text


def test_same_findings_give_the_same_bytes(tmp_path):
    one, two = (plot_matching(LINES, COSTS, tmp_path / name) for name in ("a.png", "b.png"))
    assert one.read_bytes() == two.read_bytes()


def test_cells_count_neurons():
    assert cells(np.array([2, 0, 1])).tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    many = np.random.default_rng(0).permutation(1000)
    assert cells(many).shape == (40, 40)
    assert cells(many).sum(0).tolist() == cells(many).sum(1).tolist() == [25] * 40


def test_groups_within_blocks_are_left_out(tmp_path):
    spec = trace(build_model("vit", (1, 8, 8), 10, seed=0), torch.zeros(2, 1, 8, 8))
    assert any(group.inner for group in spec.groups)
    text = svg(plot_permutations(spec, spec.identity(), tmp_path / "p.svg"))
    within = {g for group in spec.groups for block in group.inner for g in block}
    assert text.count("neurons,") == len(spec.groups) - len(within)


def test_mistakes(tmp_path):
    spec = trace(build_model("mlp", (4,), 2, seed=0), torch.zeros(2, 4))
    other = Similarity(("x",), ONES[:1], ONES[:1])
    for draw, words in (
        (lambda: plot_barrier({}, tmp_path), "no line"),
        (lambda: plot_barrier(LINES, tmp_path / "barrier.txt"), r"\.png"),
        (lambda: plot_costs(MatchingCosts((), (), ()), tmp_path), "no group"),
        (lambda: plot_similarity(SIMILARITY, other, tmp_path), "different groups"),
        (lambda: plot_similarity(SIMILARITY, SIMILARITY, tmp_path, pair=(0, 3)), "by number from 0"),
        (lambda: plot_permutations(spec, [], tmp_path), "0 permutations for 1 groups"),
        (lambda: plot_permutations(PermutationSpec(()), [], tmp_path), "no group"),
    ):
        with pytest.raises(InvalidOption, match=words):
            draw()
    assert not list(tmp_path.iterdir())
