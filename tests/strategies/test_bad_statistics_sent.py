"""Statistics that cannot be true, as they come in Flower messages and in merges on further exchanges."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ConfigRecord

from fedmerge.simulation import SimulationGrid
from fedmerge.statistics.sending.compression import decode
from fedmerge.strategies import MergeStrategy, from_arrays, to_arrays
from tests.answered import shallow
from tests.federation import CLIENTS, initial, tiny_app, tiny_model

STATISTICS = {"fedfisher": "fisher_kfac", "fisher": "fisher_diag", "regmean": "gram", "maecho": "gram"}


def indefinite(tensor):
    """Everything beside the diagonal of the first matrix larger than it allows."""
    whole = torch.full_like(tensor, 5 * float(tensor.diagonal().max()))
    whole.diagonal().copy_(tensor.diagonal().clamp_min(0.1))
    return whole


KINDS = {
    "an empty record": lambda value: {},
    "a layer less": lambda value: {n: t for n, t in value.items() if not n.startswith("3.")},
    "a matrix that is indefinite": lambda value: {
        n: indefinite(t) if t.ndim == 2 else -t - 1 for n, t in value.items()
    },
    "whole numbers": lambda value: {n: t.long() for n, t in value.items()},
    "1e30": lambda value: {n: torch.full_like(t, 1e30) for n, t in value.items()},
}


def merged(method, spoil=None, place=None, known=True, compression="auto"):
    """What a server makes of the clients' replies, of which one is spoilt or left out."""
    known = {"model_fn": tiny_model} if known else {}
    strategy = MergeStrategy(method, fraction_evaluate=0.0, statistics={"compression": compression}, **known)
    grid = SimulationGrid(tiny_app(), CLIENTS)
    replies = list(grid.send_and_receive(list(strategy.configure_train(1, initial(), ConfigRecord(), grid))))
    replies.sort(key=lambda reply: reply.metadata.src_node_id)
    if spoil is None and place is not None:
        del replies[place]
    elif place is not None:
        content, key = shallow(replies[place].content), f"statistics.{STATISTICS[method]}"
        content[key] = to_arrays(spoil(decode(from_arrays(content[key]))))
        replies[place].content = content
    arrays, _ = strategy.aggregate_train(1, replies)
    return from_arrays(arrays), strategy.last_report


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("method", "place"), [("fedfisher", 0), ("fisher", 2), ("regmean", 1), ("maecho", 0)])
def test_a_client_that_sends_what_cannot_be_is_left_out_of_the_round(method, place, known):
    wanted, _ = merged(method, place=place, known=known)
    for kind, spoil in KINDS.items():
        got, report = merged(method, spoil, place, known)
        assert [bad.client for bad in report.dropped] == [place], kind
        assert STATISTICS[method] in report.dropped[0].reason
        torch.testing.assert_close(got, wanted, msg=kind)


@pytest.mark.parametrize("compression", ["none", "float16", "int8"])
@pytest.mark.parametrize("method", STATISTICS)
def test_honest_replies_pass_however_they_are_sent(method, compression):
    _, report = merged(method, compression=compression)
    assert report.accepted == tuple(range(CLIENTS))
