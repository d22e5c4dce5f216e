"""Each edit beside a few lines of NumPy, and its laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedmerge.edits import Breadcrumbs, Clip, Dare, Della, EditContext, Lines, Trim
from fedmerge.edits.della import keep_probabilities
from fedmerge.errors import InvalidOption
from fedmerge.registry import build, entries


def update(seed: int = 0) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (4, 3, 2, 2), "conv.bias": (4,), "fc.weight": (5, 7), "fc.bias": (5,), "scale": ()}
    return {name: torch.randn(shape, generator=draws, dtype=torch.float64) for name, shape in shapes.items()}


def flat(delta):
    return torch.cat([t.flatten() for t in delta.values()])


@pytest.mark.parametrize("name", sorted(entries("edit")))
def test_no_change_stays_none_and_the_update_itself_is_left_alone(name):
    edit, delta = build("edit", name, {}), update()
    before = {n: t.clone() for n, t in delta.items()}
    edited = edit.edit(delta, EditContext(seed=1))
    assert {n: t.shape for n, t in edited.items()} == {n: t.shape for n, t in delta.items()}
    assert all(torch.equal(delta[n], before[n]) for n in delta)
    still = edit.edit({n: torch.zeros_like(t) for n, t in delta.items()}, EditContext(seed=1))
    assert all(bool((t == 0).all()) for t in still.values())


def test_trim_keeps_the_largest_of_the_whole_model():
    delta = update()
    kept = Trim(density=0.3).edit(delta, EditContext())
    numbers = flat(delta).numpy()
    count = round(0.3 * numbers.size)
    wanted = np.where(np.abs(numbers) >= np.sort(np.abs(numbers))[-count], numbers, 0.0)
    assert np.array_equal(flat(kept).numpy(), wanted)


def test_trim_within_each_tensor():
    delta = update()
    kept = Trim(density=0.5, scope="tensor").edit(delta, EditContext())
    for name, tensor in delta.items():
        numbers = tensor.flatten().numpy()
        count = round(0.5 * numbers.size)
        wanted = np.zeros_like(numbers)
        top = np.argsort(-np.abs(numbers))[:count]
        wanted[top] = numbers[top]
        assert np.array_equal(kept[name].flatten().numpy(), wanted)


def test_trim_keeps_exactly_so_many_where_magnitudes_are_equal():
    delta = {"w": torch.tensor([1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])}
    assert Trim(density=0.25).edit(delta, EditContext())["w"].tolist() == [1.0, -1.0, 0, 0, 0, 0, 0, 0]
    assert Trim(density=1.0).edit(delta, EditContext())["w"] is delta["w"]


def test_dare_keeps_its_share_and_enlarges_what_stays():
    delta = {"w": torch.linspace(1.0, 2.0, 20000, dtype=torch.float64)}
    kept = Dare(density=0.3).edit(delta, EditContext(seed=5))["w"]
    stays = kept != 0
    assert abs(float(stays.double().mean()) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 20000)
    torch.testing.assert_close(kept[stays], delta["w"][stays] / 0.3, rtol=1e-12, atol=0)
    assert torch.equal(
        Dare(density=0.3, rescale="none").edit(delta, EditContext(seed=5))["w"][stays], delta["w"][stays]
    )


@pytest.mark.parametrize("edit", [Dare(density=0.4), Della(density=0.4, epsilon=0.2)])
def test_the_mean_over_draws_is_the_update(edit):
    delta = {"w": torch.tensor([[0.5, -1.0, 2.0, 4.0]], dtype=torch.float64)}
    draws = torch.stack([edit.edit(delta, EditContext(round=r))["w"] for r in range(4000)])
    # The variance of one entry is delta^2 (1 - q) / q, with q of at least 0.2.
    assert ((draws.mean(0) - delta["w"]).abs() < 4.5 * delta["w"].abs() * math.sqrt(4 / 4000)).all()


@pytest.mark.parametrize("edit", [Dare(density=0.5, rescale="l1"), Della(density=0.5, epsilon=0.3, rescale="l1")])
def test_l1_norms_are_kept(edit):
    delta = update()
    kept = edit.edit(delta, EditContext(seed=3))
    for name in ("conv.weight", "fc.weight"):
        assert float(kept[name].abs().sum()) == pytest.approx(float(delta[name].abs().sum()), rel=1e-12)
        assert not torch.equal(kept[name], delta[name])


@pytest.mark.parametrize("name", ["dare", "della"])
def test_draws_are_of_the_client_the_round_and_the_place(name):
    edit, delta = build("edit", name, {}), update()
    same = EditContext(client=1, round=2, seed=3)
    first = flat(edit.edit(delta, same))
    assert torch.equal(first, flat(edit.edit(delta, same)))
    for other in (EditContext(2, 2, 3), EditContext(1, 3, 3), EditContext(1, 2, 4), EditContext(1, 2, 3, {}, 1)):
        assert not torch.equal(first, flat(edit.edit(delta, other)))


def test_dellas_probabilities_by_rank():
    rows = torch.tensor([[3.0, -1.0, 2.0, 0.0, 5.0], [1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    ranks = np.array([[3, 1, 2, 0, 4], [0, 1, 2, 3, 4]])  # equal ones in their order
    wanted = (0.6 - 0.1) + 2 * 0.1 * ranks / 4
    np.testing.assert_allclose(keep_probabilities(rows, 0.6, 0.1).numpy(), wanted, rtol=1e-12)
    assert keep_probabilities(torch.ones(3, 1), 0.6, 0.1).flatten().tolist() == pytest.approx([0.6] * 3)


def test_della_without_a_range_is_dare():
    delta = update()
    della, dare = Della(density=0.4, epsilon=0.0).edit(delta, EditContext()), Dare(0.4).edit(delta, EditContext())
    torch.testing.assert_close(della, dare, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_breadcrumbs_between_the_largest_and_the_smallest(scope):
    delta = update()
    kept = Breadcrumbs(density=0.45, gamma=0.15, scope=scope).edit(delta, EditContext())
    for name, tensor in delta.items():
        array = tensor.numpy()
        rows = array.reshape(1, -1) if scope == "tensor" or array.ndim < 2 else array.reshape(-1, array.shape[-1])
        wanted = np.zeros_like(rows)
        for r, row in enumerate(rows):
            order = np.argsort(-np.abs(row))
            top = int(0.15 * row.size)
            middle = order[top : top + int(0.45 * row.size)]
            wanted[r, middle] = row[middle]
        wanted = array if array.size == 1 else wanted.reshape(array.shape)
        np.testing.assert_array_equal(kept[name].numpy(), wanted)


def test_breadcrumbs_that_drop_nothing_change_nothing():
    delta = update()
    assert torch.equal(flat(Breadcrumbs(density=1.0, gamma=0.0).edit(delta, EditContext())), flat(delta))


def test_clip_moves_towards_the_step_before():
    delta, last = update(1), update(2)
    clipped = Clip(radius=0.5).edit(delta, EditContext(memory=last))
    x, v = flat(delta).numpy(), flat(last).numpy()
    wanted = v + (x - v) * min(1.0, 0.5 / np.linalg.norm(x - v))
    np.testing.assert_allclose(flat(clipped).numpy(), wanted, rtol=1e-12)
    near = {n: t + 0.01 for n, t in last.items()}
    assert torch.allclose(flat(Clip(radius=5.0).edit(near, EditContext(memory=last))), flat(near), rtol=1e-12)


def test_clip_bears_numbers_whose_squares_overflow():
    clipped = Clip(radius=2.0).edit({"w": torch.tensor([1e30, -1e30])}, EditContext())["w"]
    torch.testing.assert_close(clipped, torch.tensor([1.0, -1.0]) * math.sqrt(2))


def test_lines_scale_by_depth():
    delta = {f"{layer}.weight": torch.ones(2) for layer in ("stem", "blocks.0.a", "blocks.0.b", "blocks.1.a", "head")}
    factors = [float(t[0]) for t in Lines(first=0.2, last=0.8).edit(delta, EditContext()).values()]
    assert factors == pytest.approx([0.2, 0.4, 0.4, 0.6, 0.8])
    assert float(Lines(first=0.2, last=0.8).edit({"w": torch.ones(1)}, EditContext())["w"]) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("name", "options", "culprit"),
    [
        ("trim", {"density": 0.0}, "density"),
        ("trim", {"scope": "row"}, "scope"),
        ("dare", {"density": 1.5}, "density"),
        ("dare", {"rescale": "l2"}, "rescale"),
        ("della", {"density": 0.9, "epsilon": 0.2}, "epsilon smaller"),
        ("breadcrumbs", {"density": 0.9, "gamma": 0.2}, "density and gamma"),
        ("clip", {"radius": 0.0}, "radius"),
        ("lines", {"first": -1.0}, "first"),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, options, culprit):
    with pytest.raises(InvalidOption, match=culprit):
        build("edit", name, options)
