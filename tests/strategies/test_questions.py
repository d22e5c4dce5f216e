"""Questions about a merged model, as messages on a grid."""

from __future__ import annotations

import logging

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

import fedmerge
from fedmerge.models.resize import resize
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.wrapped_grid import WrappedGrid
from fedmerge.strategies import MergeStrategy, from_arrays
from fedmerge.strategies.cohort_order import CohortAnswer
from fedmerge.strategies.questions import ACTION
from tests.federation import CLIENTS, TRAINING, initial, plain_model, tiny_app, tiny_data

METHODS = ["fedkfac", "fedavg+ridge_head", "fednova+logistic_head+natural_gradient"]


def started(method, workers=1, rounds=1, **keywords):
    strategy = MergeStrategy(method, fraction_evaluate=0.0, model_fn=plain_model, example=torch.zeros(2, 4), **keywords)
    with SimulationGrid(tiny_app(model_fn=plain_model), CLIENTS, workers=workers) as grid:
        return from_arrays(strategy.start(grid, initial(plain_model), num_rounds=rounds).arrays), strategy


@pytest.mark.parametrize("method", METHODS)
def test_a_round_gives_what_merging_the_clients_models_offline_gives(method):
    from fedmerge.training import train

    found, _ = started(method, statistics={"compression": "none"})
    models, loaders = [], []
    for client in range(CLIENTS):
        data, model = tiny_data(client, CLIENTS), plain_model()
        report = train(model, data.train_x, data.train_y, TRAINING, seed=0, client=client, round=1)
        models.append(model)
        loaders.append([(data.train_x, data.train_y)])
        steps = report.steps
    known = {}
    if "fednova" in method:
        known["statistics"] = [{"local_steps": len(x[0][0]) // 4} for x in loaders]
    merged = fedmerge.merge(
        models, method, weights=[len(x[0][0]) for x in loaders], base=plain_model(), clients=loaders, **known
    )
    assert steps
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_further_rounds_go_on_from_the_refined_model():
    found, strategy = started("fedkfac", rounds=3)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
    assert strategy.last_report.round == 3


@pytest.mark.slow
def test_on_ray_it_is_the_same():
    here, _ = started("fedkfac")
    there, _ = started("fedkfac", workers=2)
    for name, tensor in here.items():
        torch.testing.assert_close(there[name], tensor, rtol=1e-4, atol=1e-5)


def asked(content):
    with SimulationGrid(tiny_app(model_fn=plain_model), CLIENTS) as grid:
        node = next(iter(grid.get_node_ids()))
        (reply,) = grid.send_and_receive([Message(content, message_type=f"query.{ACTION}", dst_node_id=node)])
    return reply


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ({}, "brings None questions"),
        ({"config": ConfigRecord({"questions": 1})}, "not complete"),
        (
            {
                "config": ConfigRecord({"questions": 1}),
                "0.base": ArrayRecord({}),
                "0.question": ConfigRecord(
                    {"directions": 1, "points": [1.0], "number-of-points": 2, "at": 0, "holdout": 10,
                     "compression": "none", "budget": 1.0}
                ),
            },
            "2 points around 1 directions",
        ),
    ],
)  # fmt: skip
def test_a_garbled_question_gets_an_error_reply_with_its_reason(records, words):
    reply = asked(RecordDict(records))
    assert reply.has_error()
    assert words in reply.error.reason


def test_a_client_that_answers_nonsense_is_left_out(caplog):
    class Lying(WrappedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = self._grid.send_and_receive(messages, timeout=timeout)
            if isinstance(replies, CohortAnswer):
                return replies
            replies = list(replies)
            if replies and replies[0].metadata.message_type == f"query.{ACTION}":
                for key in list(replies[0].content.array_records):
                    replies[0].content[key] = ArrayRecord({})
            return replies

    strategy = MergeStrategy("fedavg+ridge_head", fraction_evaluate=0.0)
    with caplog.at_level(logging.WARNING), SimulationGrid(tiny_app(model_fn=plain_model), CLIENTS) as grid:
        found = from_arrays(strategy.start(Lying(grid), initial(plain_model), num_rounds=1).arrays)
    assert "its answer cannot be read and is left out" in caplog.text
    resize(plain_model(), found)
