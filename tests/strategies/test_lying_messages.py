"""Answers to questions that come as messages: what they may bring, and whose they are."""

from __future__ import annotations

import asyncio
import logging

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedmerge.errors import ConfigError, InvalidOption
from fedmerge.merging import build_pipeline
from fedmerge.refine import Trust
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.grids.wrapped_grid import WrappedGrid
from fedmerge.simulation.runs.config import make_config
from fedmerge.strategies import MergeStrategy, from_arrays, to_arrays
from fedmerge.strategies.run_settings import RunSettings
from fedmerge.wire.keys import ACTION
from tests.answered import answer
from tests.federation import CLIENTS, initial, plain_model, tiny_app

LIAR = 1
ZEROS = to_arrays({"w": torch.zeros(3000)})


class Meddling(WrappedGrid):
    """Changes the replies to questions: those of one client, or which there are."""

    def __init__(self, grid, change=None, replies=lambda replies: replies):
        super().__init__(grid)
        self._change, self._replies, self.counted = change, replies, []

    def send_and_receive(self, messages, *, timeout=None):
        found = self._grid.send_and_receive(messages, timeout=timeout)
        found = sorted(found, key=lambda reply: reply.metadata.src_node_id)
        if not found or found[0].metadata.message_type != f"query.{ACTION}":
            return found
        self.counted.append(len(found))
        if self._change is not None and len(found) == CLIENTS:
            self._change(found[LIAR].content)
        return self._replies(found)


def merged(change=None, replies=lambda replies: replies, method="fedavg+ridge_head", **keywords):
    strategy = MergeStrategy(method, fraction_evaluate=0.0, model_fn=plain_model, **keywords)
    with SimulationGrid(tiny_app(model_fn=plain_model), CLIENTS) as grid:
        meddling = Meddling(grid, change, replies)
        found = from_arrays(strategy.start(meddling, initial(plain_model), num_rounds=1).arrays)
    return found, strategy.last_report, meddling


def add_tensor(content, key="0.statistics.head_sums"):
    content[key] = ArrayRecord({**content[key], **ZEROS})


def widen(content):
    key = "0.statistics.head_sums"
    content[key] = to_arrays({name: tensor.double() for name, tensor in from_arrays(content[key]).items()})


def add_entry(content, key, **entries):
    content[key] = type(content[key])({**content[key], **entries})


EXTRA = {
    "a record of tensors": lambda content: content.__setitem__("more", ZEROS),
    "a statistic": lambda content: content.__setitem__("0.statistics.gram", ZEROS),
    "an answer to another question": lambda content: content.__setitem__("7.losses", ZEROS),
    "a tensor among losses": lambda content: add_tensor(content, "0.losses"),
    "a setting": lambda content: content.__setitem__("more", ConfigRecord({"a": "b" * 12_000})),
    "a metric": lambda content: add_entry(content, "metrics", more=1.0),
    "a list of metrics": lambda content: add_entry(content, "metrics", **{"num-examples": [1.0] * 3000}),
    "numbers": lambda content: content.__setitem__("more", MetricRecord({"a": [1.0] * 1500})),
    "a count": lambda content: add_entry(content, "0.counts", more="b" * 12_000),
    "a text in the place of noise": lambda content: add_entry(content, "0.counts", noise=" " * 12_000),
    "a name of the client's own": lambda content: add_entry(content, "client", name="b" * 12_000),
}


@pytest.mark.parametrize("kind", EXTRA)
def test_a_reply_that_brings_more_than_was_asked_for_is_left_out(kind, caplog):
    with caplog.at_level(logging.WARNING):
        found, _, _ = merged(EXTRA[kind])
    others, _, _ = merged(replies=lambda replies: [one for i, one in enumerate(replies) if i != LIAR])
    assert f"client {LIAR}: its answer cannot be read and is left out" in caplog.text
    assert len(caplog.text) < 20_000  # a long reply makes no long log
    for name, tensor in others.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("change", [add_tensor, widen])
def test_a_statistic_that_brings_more_is_named_in_the_report_and_its_client_is_asked_no_more(change):
    _, report, meddling = merged(change)
    assert [client for client, _ in report.refused] == [LIAR]
    assert meddling.counted == [CLIENTS, CLIENTS - 1]


@pytest.mark.parametrize("missing", ["0.losses", "0.counts", "0.statistics.head_sums"])
def test_a_reply_that_lacks_a_part_is_left_out(missing, caplog):
    with caplog.at_level(logging.WARNING):
        merged(lambda content: content.pop(missing))
    assert f"client {LIAR}: its answer" in caplog.text


def twice(replies):
    """Once as it is, once with other losses."""
    other = RecordDict(dict(replies[LIAR].content))
    if "0.losses" in other:
        other["0.losses"] = to_arrays({"losses": 1 + from_arrays(other["0.losses"])["losses"]})
    other["0.counts"] = ConfigRecord({**other["0.counts"], "judged": 0})
    return [*replies, answer(replies[LIAR].metadata.src_node_id, other, f"query.{ACTION}")]


def of_nobody(replies):
    return [*replies, answer(987_654, RecordDict(dict(replies[0].content)), f"query.{ACTION}")]


def test_a_node_that_answers_twice_and_not_the_same_is_left_out():
    found, report, _ = merged(replies=twice)
    others, _, _ = merged(replies=lambda replies: [one for i, one in enumerate(replies) if i != LIAR])
    assert [failed.client for failed in report.failed][:1] == [LIAR]
    for name, tensor in others.items():
        torch.testing.assert_close(found[name], tensor)


def test_a_node_that_was_not_asked_is_named_and_left_out():
    found, report, _ = merged(replies=of_nobody)
    assert "987654" in str(report.failed[0].client)
    assert report.refused == ()
    for name, tensor in merged()[0].items():
        torch.testing.assert_close(found[name], tensor)


def test_a_client_that_claims_more_examples_than_in_training_is_left_out():
    def claim(content):
        add_entry(content, "0.counts", examples=10**9)

    for method in ("fedavg+ridge_head", "fedfisher+ridge_head"):
        _, report, _ = merged(claim, method=method, example=torch.zeros(2, 4))
        assert [client for client, _ in report.refused] == [LIAR]
        assert "told of" in report.refused[0][1]


def test_how_far_clients_are_believed_is_a_setting_of_strategies_runs_and_configurations():
    wary = Trust("median", liars=0.3)
    assert MergeStrategy("fedkfac", trust=wary).pipeline.trust == wary
    config = make_config({"methods": ["fedkfac"], "trust": {"judgement": "median", "liars": 0.3}})
    assert config.trust == wary
    assert RunSettings(trust=wary).agreed_pipeline(build_pipeline("fedkfac")).trust == wary
    assert RunSettings(trust=wary).beyond_flower() == ["trust"]
    with pytest.raises(InvalidOption, match="trust"):
        MergeStrategy(build_pipeline("fedkfac"), trust=wary)
    with pytest.raises(ConfigError, match=r"trust.judgement = 'loud'"):
        make_config({"trust": {"judgement": "loud"}})


@pytest.mark.parametrize("raised", [SystemExit(3), GeneratorExit(), asyncio.CancelledError()], ids=repr)
def test_whatever_else_than_an_error_a_client_raises_costs_that_client_alone(raised):
    def breaking(message, context, call_next):
        if context.node_config["partition-id"] == LIAR:
            raise raised
        return call_next(message, context)

    strategy = MergeStrategy("fedavg", fraction_evaluate=0.0)
    with SimulationGrid(tiny_app(breaking, model_fn=plain_model), CLIENTS, workers=1) as grid:
        strategy.start(grid, initial(plain_model), num_rounds=1)
    assert strategy.last_report.accepted == (0, 2)
