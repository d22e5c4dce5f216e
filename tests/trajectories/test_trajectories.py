"""Averages over rounds beside a few lines of NumPy, and what training goes on from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.data import ClientData
from fedmerge.errors import InvalidOption
from fedmerge.merging import build_pipeline
from fedmerge.merging.judged_model import going_on, judged
from fedmerge.refine import Privacy
from fedmerge.registry import build
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import MergeStrategy, client_app, from_arrays, to_arrays
from fedmerge.trajectories import Ema, Lawa, Paint, Swa, Swad, TrajectoryContext, WiseFt
from fedmerge.trajectories.swad import window
from fedmerge.update import ClientUpdate, MergeContext
from tests.federation import TRAINING

MODELS = np.random.default_rng(0).normal(size=(9, 4))


def averages(trajectory, models=MODELS, losses=None):
    """What is judged after each round."""
    memory, judged = {}, []
    for n, model in enumerate(models):
        told = None if losses is None else lambda state, direction, factors, n=n: [losses[n]]
        context = TrajectoryContext(n + 1, {"w": torch.zeros(4, dtype=torch.float64)}, told)
        mean, memory = trajectory.average({"w": torch.tensor(model)}, context, memory)
        judged.append(mean["w"].numpy())
    return np.stack(judged)


def test_swa_is_the_mean_from_its_start_on():
    wanted = [MODELS[0], *(MODELS[1 : n + 1].mean(0) for n in range(1, 9))]
    np.testing.assert_allclose(averages(Swa(start=2)), wanted, rtol=1e-12)


def test_swa_counts_every_third():
    judged = averages(Swa(every=3))
    for n in range(9):
        np.testing.assert_allclose(judged[n], MODELS[: n + 1 : 3].mean(0), rtol=1e-12)


def test_ema_by_its_recursion():
    mean, wanted = MODELS[0], [MODELS[0]]
    for model in MODELS[1:]:
        mean = 0.7 * mean + 0.3 * model
        wanted.append(mean)
    np.testing.assert_allclose(averages(Ema(rate=0.3)), wanted, rtol=1e-12)
    np.testing.assert_allclose(averages(Ema(rate=1.0)), MODELS, rtol=1e-12)


def test_lawa_is_the_mean_of_the_latest():
    np.testing.assert_allclose(
        averages(Lawa(latest=3)), [MODELS[max(0, n - 2) : n + 1].mean(0) for n in range(9)], rtol=1e-12
    )
    np.testing.assert_array_equal(averages(Lawa(latest=1)), MODELS)
    judged = averages(Lawa(latest=2, every=2))
    np.testing.assert_allclose(judged[5], MODELS[[2, 4]].mean(0), rtol=1e-12)


@pytest.mark.parametrize("trajectory", [Swa(), Ema(), Lawa(), Swad(converge=1, tolerance=2)])
def test_a_run_that_stands_still_is_judged_where_it_stands(trajectory):
    still = np.repeat(MODELS[:1], 5, axis=0)
    np.testing.assert_allclose(averages(trajectory, still, losses=[1.0] * 5), still, rtol=1e-12)


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([3.0, 2.0, 1.0], (None, 3)),  # still falling
        ([1.0, 1.1, 1.2], (0, 3)),  # the oldest of three is the least
        ([3.0, 1.0, 1.1, 1.2, 1.3], (1, 5)),
        ([3.0, 1.0, 1.1, 1.2, 9.0, 9.0, 1.3], (1, 7)),  # not all of the last three are above
        ([3.0, 1.0, 1.1, 1.2, 9.0, 9.0, 9.0, 1.0], (1, 4)),
        ([1.0, 1.0, 1.0, 1.3, 1.31, 1.31, 1.31], (0, 4)),  # threshold 1.3 = 1.0 * (1 + 0.3)
        ([1.0, 1.0, 1.0, 1.3, 1.3, 1.3, 1.3], (0, 7)),
    ],
)
def test_swads_window(losses, found):
    assert window(losses, converge=3, tolerance=3, ratio=0.3) == found


@pytest.mark.parametrize("losses", [[3.0, 1.0, 1.1, 1.2, 9.0, 9.0, 1.3, 9, 9], [2.0, 1.0, 1.1, 1.2, 9, 9, 9, 9, 9]])
def test_swad_is_the_mean_of_its_window(losses):
    judged = averages(Swad(converge=3, tolerance=3), losses=losses)
    for n in range(9):
        first, end = window(losses[: n + 1], 3, 3, 0.3)
        wanted = MODELS[n] if first is None else MODELS[first:end].mean(0)
        np.testing.assert_allclose(judged[n], wanted, rtol=1e-12)


def test_swad_keeps_no_more_models_than_it_may_still_need():
    memory, trajectory = {}, Swad(converge=2, tolerance=3)
    for n in range(12):
        context = TrajectoryContext(n + 1, None, lambda *_: [1.0])
        _, memory = trajectory.average({"w": torch.ones(4)}, context, memory)
    assert sum(name.startswith("model") for name in memory) == 3


def test_wise_ft_and_paint_go_back_to_the_first_model():
    base = {"w": torch.tensor([1.0, 1.0], dtype=torch.float64)}
    context = TrajectoryContext(1, base)
    between, memory = WiseFt(alpha=0.2).average({"w": torch.tensor([6.0, 1.0], dtype=torch.float64)}, context, {})
    assert between["w"].tolist() == [2.0, 1.0]
    later = TrajectoryContext(2, {"w": torch.full((2,), 99.0)})
    assert WiseFt(alpha=0.0).average({"w": torch.zeros(2)}, later, memory)[0]["w"].tolist() == [1.0, 1.0]

    def losses(state, direction, factors):
        return [float(((state["w"] + f * direction["w"]) - 3.5).square()[0]) for f in factors]

    asked = TrajectoryContext(1, base, losses)
    painted, _ = Paint(points=11).average({"w": torch.tensor([6.0, 1.0], dtype=torch.float64)}, asked, {})
    assert painted["w"].tolist() == [3.5, 1.0]  # half-way


def test_clients_go_on_from_the_merged_model_and_the_average_is_judged():
    pipeline = build_pipeline("fedavg+swa")
    base = {"w": torch.zeros(1), "count": torch.tensor(3)}
    first = pipeline.merge(
        [ClientUpdate(0, {"w": torch.tensor([2.0]), "count": torch.tensor(4)})], MergeContext(base=base)
    )
    assert first.state["w"].item() == 2.0
    second = pipeline.merge(
        [ClientUpdate(0, {"w": torch.tensor([6.0]), "count": torch.tensor(5)})],
        MergeContext(base=first.state, round=2),
        first.memory,
    )
    assert second.state["w"].item() == 4.0
    assert second.state["count"].item() == 5
    assert going_on(second.memory)["w"].item() == 6.0
    averaged = build_pipeline("fedavg+swa(continue_from=average)")
    assert not going_on(averaged.merge([ClientUpdate(0, dict(base))], MergeContext(base=base)).memory)


@pytest.mark.parametrize(
    ("name", "options", "culprit"),
    [
        ("swa", {"start": 0}, "start"),
        ("swa", {"continue_from": "last"}, "continue_from"),
        ("ema", {"rate": 0.0}, "rate"),
        ("lawa", {"latest": 0}, "latest"),
        ("swad", {"converge": 4, "tolerance": 3}, "tolerance"),
        ("wise_ft", {"alpha": 1.5}, "alpha"),
        ("paint", {"points": 1}, "points"),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, options, culprit):
    with pytest.raises(InvalidOption, match=culprit):
        build("trajectory", name, options)


def test_what_cannot_be_had_is_asked_for():
    models = [nn.Linear(2, 1), nn.Linear(2, 1)]
    with pytest.raises(InvalidOption, match="pass base="):
        fedmerge.merge(models, "fedavg+wise_ft")
    with pytest.raises(InvalidOption, match="pass clients="):
        fedmerge.merge(models, "fedavg+paint", base=nn.Linear(2, 1))
    with pytest.raises(InvalidOption, match="Swad has clients judge"):
        build_pipeline("fedavg+swad", privacy=Privacy(masks=True))


@pytest.mark.parametrize("name", ["swa", "ema", "lawa", "swad", "wise_ft", "paint"])
def test_models_that_grow_have_no_average(name):
    trajectory, memory = build("trajectory", name, {}), {}

    def round_of(width, number, memory):
        state = {"w": torch.ones(width)}
        known = TrajectoryContext(number, {"w": torch.zeros(2)}, lambda *asked: [1.0] * len(asked[2]))
        return judged((trajectory,), state, ["w"], lambda _: known, memory)[1]

    memory = round_of(2, 1, memory)
    with pytest.raises(InvalidOption, match=r"'w' has shape \[3\], and \[2\].*keeps widths"):
        round_of(3, 2, memory)


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def data(client: int, _total: int) -> ClientData:
    draws = torch.Generator().manual_seed(client)
    x = torch.randn(30, 4, generator=draws)
    return ClientData(x, x[:, :3].argmax(1), x[:4], x[:4, :3].argmax(1))


def run(method: str, rounds: int, **settings: object) -> list[dict[str, torch.Tensor]]:
    """The model that each round ended with."""
    ended = []

    def note(round, arrays):
        ended.append(from_arrays(arrays))

    strategy = MergeStrategy(method, model_fn=model, fraction_evaluate=0.0, seed=3, **settings)
    with SimulationGrid(client_app(model, data, training=TRAINING), 3) as grid:
        strategy.start(grid, to_arrays(model().state_dict()), num_rounds=rounds, evaluate_fn=note)
    return ended[1:]


def test_rounds_on_a_grid_end_with_the_mean_of_what_plain_rounds_end_with():
    plain, averaged = run("fedavg", 3), run("fedavg+swa", 3)
    for name in ("0.weight", "1.running_mean", "3.bias"):
        torch.testing.assert_close(averaged[2][name], sum(state[name] for state in plain) / 3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["fedavg+swa", "fedavg+swad(converge=1,tolerance=2)", "fedavg+paint(points=3)"])
def test_a_run_goes_on_from_its_checkpoint_to_the_same_model(method, tmp_path):
    whole = run(method, 4)
    run(method, 2, checkpoint_dir=tmp_path)
    again = run(method, 4, checkpoint_dir=tmp_path)
    for name, tensor in whole[-1].items():
        assert torch.equal(tensor, again[-1][name])
