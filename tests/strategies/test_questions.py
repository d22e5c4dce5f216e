"""Questions about a merged model, as messages on a grid."""

from __future__ import annotations

import logging

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import nn

import fedmerge
from fedmerge.errors import InvalidOption
from fedmerge.merging import build_pipeline
from fedmerge.models.resize import resize
from fedmerge.questions import Question
from fedmerge.refine import Privacy
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.grids.wrapped_grid import WrappedGrid
from fedmerge.statistics import NoisySums
from fedmerge.strategies import MergeStrategy, client_app, from_arrays, to_arrays
from fedmerge.training import train
from fedmerge.wire.keys import ACTION, KEEP_KEY
from fedmerge.wire.question_records import write_question
from tests.federation import CLIENTS, TRAINING, initial, plain_model, tiny_app, tiny_data

METHODS = [
    "fedkfac",
    "fedavg+ridge_head",
    "fednova+logistic_head+natural_gradient",
    "fedavg+sequential_refit(head=true)",
    "otfusion+sequential_refit(head=true)+ridge_head",
    "otfusion+surgery(rank=2)",
    "adamerging(evaluations=3)",
    "evolutionary(evaluations=7)",
    "afl",
    "gaussian_heads(classifier=qda)",
    "regmean_plusplus",
]
NOISE = NoisySums(clip=2.0, noise_multiplier=0.05)


def started(method, workers=1, rounds=1, noise_seed=None, wrapped=lambda grid: grid, **keywords):
    strategy = MergeStrategy(method, fraction_evaluate=0.0, model_fn=plain_model, example=torch.zeros(2, 4), **keywords)
    app = client_app(plain_model, tiny_data, training=TRAINING, noise_seed=noise_seed)
    with SimulationGrid(app, CLIENTS, workers=workers) as bare:
        grid = wrapped(bare)
        return from_arrays(strategy.start(grid, initial(plain_model), num_rounds=rounds).arrays), strategy


@pytest.mark.parametrize("method", METHODS)
def test_a_round_gives_what_merging_the_clients_models_offline_gives(method):
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


def own_start(client):
    with torch.random.fork_rng():
        torch.manual_seed(10 + client)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def test_clients_that_started_apart_compare_with_their_model_as_it_was_aligned():
    method = "rebasin+sequential_refit(head=true)"
    app = client_app(plain_model, tiny_data, training=TRAINING, own_model_fn=own_start)
    strategy = MergeStrategy(method, fraction_evaluate=0.0, model_fn=plain_model, example=torch.zeros(2, 4))
    with SimulationGrid(app, CLIENTS) as grid:
        found = from_arrays(strategy.start(grid, initial(plain_model), num_rounds=1).arrays)
    models, data = [own_start(client) for client in range(CLIENTS)], [tiny_data(i, CLIENTS) for i in range(CLIENTS)]
    for client, (model, one) in enumerate(zip(models, data, strict=True)):
        train(model, one.train_x, one.train_y, TRAINING, seed=0, client=client, round=1)
    loaders = [[(one.train_x, one.train_y)] for one in data]
    merged = fedmerge.merge(models, method, weights=[len(one.train_x) for one in data], clients=loaders)
    aligned = fedmerge.merge(models, "rebasin", weights=[len(one.train_x) for one in data], example=torch.zeros(2, 4))
    assert not torch.allclose(merged[0].weight, aligned[0].weight)  # the refit is taken
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_further_rounds_go_on_from_the_refined_model():
    found, strategy = started("fedkfac", rounds=3)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
    assert strategy.last_report.round == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["fedkfac", pytest.param("otfusion+sequential_refit(head=true)", marks=pytest.mark.study)]
)
def test_on_ray_it_is_the_same(method):
    here, _ = started(method)
    there, _ = started(method, workers=2)
    for name, tensor in here.items():
        torch.testing.assert_close(there[name], tensor, rtol=1e-4, atol=1e-5)


def test_what_clients_keep_for_a_comparison_is_gone_with_the_next_training():
    class Watched(WrappedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            told.extend(m.content["config"].get(KEEP_KEY) for m in messages if m.metadata.message_type == "train")
            return self._grid.send_and_receive(messages, timeout=timeout)

    told = []
    started("fedavg+sequential_refit", wrapped=Watched)
    assert told == [True] * CLIENTS
    told.clear()
    started("fedavg+ridge_head", wrapped=Watched)
    assert told == [None] * CLIENTS


def losses_told(noise, **keywords):
    """What clients say of the models they judge, and the report of the merge."""

    class Heard(WrappedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = self._grid.send_and_receive(messages, timeout=timeout)
            replies = list(replies)
            for reply in replies:
                if "0.losses" in reply.content:
                    told.append(from_arrays(reply.content["0.losses"])["losses"])
            return replies

    told = []
    privacy = Privacy(noise=NOISE) if noise else None
    _, strategy = started("fedavg+ridge_head", wrapped=Heard, privacy=privacy, **keywords)
    return torch.cat(told), strategy.last_report


def test_noise_is_the_clients_own_and_repeatable_only_where_a_simulation_wants_it():
    first, report = losses_told(True, noise_seed=1)
    assert report.answers == 2  # the head's sums, and the judgement
    assert not torch.equal(first, losses_told(False)[0])
    assert torch.equal(first, losses_told(True, noise_seed=1)[0])
    assert not torch.equal(first, losses_told(True, noise_seed=2)[0])
    assert not torch.equal(losses_told(True)[0], losses_told(True)[0])


def test_every_exchange_has_noise_of_its_own():
    class Noted(WrappedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            exchanges.update(m.content["config"].get("exchange") for m in messages if "0.base" in m.content)
            return self._grid.send_and_receive(messages, timeout=timeout)

    exchanges = set()
    started("fedavg+ridge_head", noise_seed=1, wrapped=Noted, privacy=Privacy(noise=NOISE))
    assert exchanges == {0, 1}


def test_a_client_draws_other_noise_for_another_exchange():
    question = Question(plain_model().state_dict(), (), ((),), noise=NOISE)
    app = client_app(plain_model, tiny_data, training=TRAINING, noise_seed=1)
    told = []
    with SimulationGrid(app, CLIENTS) as grid:
        node = next(iter(grid.get_node_ids()))
        for exchange in (0, 0, 1):
            content = RecordDict({"config": ConfigRecord({"questions": 1, "exchange": exchange})})
            write_question(content, 0, question)
            message = Message(content, message_type=f"query.{ACTION}", dst_node_id=node)
            (reply,) = grid.send_and_receive([message])
            told.append(from_arrays(reply.content["0.losses"])["losses"])
    assert torch.equal(told[0], told[1])
    assert not torch.equal(told[0], told[2])


def test_who_takes_the_noise_out_of_a_question_on_its_way_gets_no_answer_accepted(caplog):
    class Curious(WrappedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            for message in messages:
                if "0.question" in message.content:
                    message.content["0.question"]["noise"] = ""
            return self._grid.send_and_receive(messages, timeout=timeout)

    with caplog.at_level(logging.WARNING):
        found, _ = started("fedavg+ridge_head", wrapped=Curious, privacy=Privacy(noise=NOISE))
    plain, _ = started("fedavg")
    assert "noise None where" in caplog.text
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor)


def test_under_masks_the_sum_is_the_same():
    plain, _ = started("fedavg+ridge_head")
    found, _ = started("fedavg+ridge_head", privacy=Privacy(masks=True))
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_privacy_beside_a_ready_pipeline_is_refused():
    with pytest.raises(InvalidOption, match="privacy"):
        MergeStrategy(build_pipeline("fedavg+ridge_head"), privacy=Privacy(masks=True))


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
        (
            {
                "config": ConfigRecord({"questions": 1}),
                "0.question": ConfigRecord(
                    {"directions": 0, "points": [], "number-of-points": 0, "at": -1, "holdout": 10,
                     "compression": "none", "budget": 1.0, "noise": '{"clip": 0, "noise_multiplier": 1}'}
                ),
                "0.base": to_arrays(plain_model().state_dict()),
            },
            "clip must be a positive number",
        ),
        (
            {
                "config": ConfigRecord({"questions": 1}),
                "0.question": ConfigRecord(
                    {"directions": 0, "points": [], "number-of-points": 0, "at": -1, "holdout": 10,
                     "compression": "none", "budget": 1.0, "needs": ["refit_sums"], "needs-settings": ["{}"]}
                ),
                "0.base": to_arrays(plain_model().state_dict()),
            },
            "there is none in its Context",
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
