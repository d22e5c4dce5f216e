"""Edits within a method: where they may stand, and the same result by every road."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.data import ClientData
from fedmerge.edits import Clip, Trim
from fedmerge.edits.edit import edited, remembered
from fedmerge.errors import ConfigError, InvalidOption, UnknownName
from fedmerge.merging import build_pipeline
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import MergeStrategy, client_app, from_arrays, to_arrays
from fedmerge.update import ClientUpdate, MergeContext
from tests.federation import TRAINING

BASE = {"w": torch.tensor([1.0, 1.0, 1.0, 1.0])}
SENT = [
    ClientUpdate(0, {"w": torch.tensor([3.0, 1.5, 1.0, 0.0])}),
    ClientUpdate(1, {"w": torch.tensor([1.0, 1.0, 2.0, 5.0])}, weight=3),
]


def test_edits_are_made_in_the_order_in_which_they_are_written():
    merged = build_pipeline("trim(density=0.5)+lines(last=2)+fedavg").merge(SENT, MergeContext(base=BASE))
    deltas = torch.tensor([[2.0, 0.0, 0.0, -1.0], [0.0, 0.0, 1.0, 4.0]]) * 2
    torch.testing.assert_close(merged.state["w"], 1 + (deltas[0] + 3 * deltas[1]) / 4)


def test_statistics_and_server_steps_stand_behind_as_ever():
    pipeline = build_pipeline("dare(density=0.9)+fedfisher+server_momentum+ridge_head", {"dare": {"rescale": "l1"}})
    assert [type(edit).__name__ for edit in pipeline.edits] == ["Dare"]
    assert pipeline.edits[0].rescale == "l1"
    assert pipeline.needs
    assert pipeline.server_steps
    assert pipeline.refinements


def test_the_first_of_a_method_may_go_by_its_usual_name():
    pipeline = build_pipeline("trim+fedadam(tau=0.5)")
    assert pipeline.edits
    assert pipeline.server_steps[0].tau == 0.5


@pytest.mark.parametrize(
    ("method", "error", "told"),
    [
        ("dare", ConfigError, "dare\\+fedavg"),
        ("trim+dare", ConfigError, "aggregator behind"),
        ("fedavg+dare", UnknownName, "stands in front"),
        ("fedavg+median", UnknownName, "has one"),
        ("fedavg+ridge_head+server_momentum", ConfigError, "in front of \\+ridge_head"),
        ("fedavg+swa+recalibrate", ConfigError, "in front of \\+swa"),
        ("server_momentum+fedavg", UnknownName, "goes behind a method"),
    ],
)
def test_an_edit_in_the_wrong_place_is_told_where_it_goes(method, error, told):
    with pytest.raises(error, match=told):
        build_pipeline(method)


@pytest.mark.parametrize("method", ["trmi(density=0.5)+fedavg", "dare+trmi+fedadam", "trmi+fedavg+server_momentum"])
def test_a_misspelt_edit_is_told_the_edits_that_there_are(method):
    with pytest.raises(UnknownName, match="Did you mean 'trim'") as told:
        build_pipeline(method)
    assert told.value.kind == "edit"


def test_without_a_common_start_there_is_nothing_to_edit():
    with pytest.raises(InvalidOption, match="pass base="):
        fedmerge.merge([nn.Linear(2, 2), nn.Linear(2, 2)], "trim+fedavg")


def test_fedmerge_merge_edits_towards_the_base():
    base = nn.Linear(2, 1, bias=False)
    models = [nn.Linear(2, 1, bias=False) for _ in range(2)]
    merged = fedmerge.merge(models, "trim(density=0.5)+fedavg", base=base)
    deltas = [m.weight.detach() - base.weight.detach() for m in models]
    kept = [torch.where(d.abs() == d.abs().max(), d, 0.0) for d in deltas]
    torch.testing.assert_close(merged.weight.detach(), base.weight.detach() + sum(kept) / 2)


def test_clip_remembers_the_step_of_the_round_before():
    pipeline = build_pipeline("clip(radius=1)+fedavg")
    first = pipeline.merge([ClientUpdate(0, {"w": torch.tensor([4.0])})], MergeContext(base={"w": torch.zeros(1)}))
    assert first.state["w"].item() == pytest.approx(1.0)
    again = MergeContext(base=first.state, round=2)
    second = pipeline.merge([ClientUpdate(0, {"w": torch.tensor([9.0])})], again, first.memory)
    assert second.state["w"].item() == pytest.approx(1.0 + 2.0)  # at most radius further than the step before


def test_models_of_other_widths_have_no_update_to_edit():
    narrow, wide = ({"w": torch.zeros(2, 3)}, {"w": torch.zeros(4, 3)})
    with pytest.raises(InvalidOption, match=r"'w' of client 5 has shape \[4, 3\].*where widths differ"):
        edited((Trim(),), ClientUpdate(5, wide), MergeContext(base=narrow))


def test_a_layer_that_grew_has_no_step_to_be_remembered():
    base, merged = {"a": torch.zeros(2), "b": torch.zeros(3)}, {"a": torch.ones(2), "b": torch.ones(5)}
    kept = remembered((Clip(),), merged, MergeContext(base=base), {})
    assert {name: tensor.tolist() for name, tensor in kept.items()} == {"edit0/a": [1.0, 1.0]}


@pytest.mark.parametrize("method", ["trim+otfusion", "otfusion+swa"])
def test_a_wider_client_is_left_out_where_a_part_cannot_take_it(method):
    def net(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

    sent = [ClientUpdate(i, dict(net(width).state_dict())) for i, width in enumerate((6, 8, 6))]
    known = MergeContext(base=dict(net(6).state_dict()), model_fn=lambda: net(6), example=torch.randn(2, 4))
    result = build_pipeline(method).merge(sent, known)
    assert result.accepted == (0, 2)
    assert [bad.client for bad in result.dropped] == [1]


class Messages(MergeStrategy):
    """One that wants a message for each client."""

    reads_messages = True


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def data(client: int, _total: int) -> ClientData:
    draws = torch.Generator().manual_seed(client)
    n = 8 + 4 * client
    x = torch.randn(n, 4, generator=draws)
    return ClientData(x, torch.randint(0, 3, (n,), generator=draws), x[:0], torch.zeros(0, dtype=torch.long))


def result(method: str, strategy: type[MergeStrategy], engine: str) -> dict[str, torch.Tensor]:
    made = strategy(method, model_fn=model, fraction_evaluate=0.0, seed=3)
    with SimulationGrid(client_app(model, data, training=TRAINING), 4, engine=engine) as grid:
        done = made.start(grid, to_arrays(model().state_dict()), num_rounds=2)
    return from_arrays(done.arrays)


@pytest.mark.parametrize("method", ["dare+fedavg", "clip(radius=0.05)+fedavg", "trim(density=0.3)+median"])
def test_every_road_makes_the_same_edits(method):
    by_message = result(method, Messages, "serial")
    serial, stacked = result(method, MergeStrategy, "serial"), result(method, MergeStrategy, "stacked")
    plain = result(method.partition("+")[2], MergeStrategy, "serial")
    assert not torch.allclose(serial["0.weight"], plain["0.weight"])
    for name, tensor in by_message.items():
        assert torch.equal(tensor, serial[name])
        torch.testing.assert_close(stacked[name], tensor, rtol=1e-5, atol=1e-5)
