"""Runs with masks or noise: every record that clients send, late answers, and the bill."""

from __future__ import annotations

import json
import re
from collections import defaultdict

import pytest
import torch
from flwr.clientapp.mod import LocalDpMod

from fedmerge.errors import InvalidOption, NothingMerged
from fedmerge.refine import Privacy
from fedmerge.simulation import SimulationGrid, compare, make_config
from fedmerge.simulation.grids.wrapped_grid import WrappedGrid
from fedmerge.statistics import NoisySums
from fedmerge.strategies import MergeStrategy, client_app, from_arrays
from fedmerge.strategies import reach as questions
from fedmerge.wire.keys import ACTION
from fedmerge.wire.question_records import read_answers
from tests.federation import CLIENTS, TRAINING, initial, plain_model, tiny_app, tiny_data

NOISE = NoisySums(clip=2.0, noise_multiplier=0.05)
BOTH = Privacy(masks=True, noise=NoisySums(clip=2.0, noise_multiplier=0.05, sharers=3))
QUESTIONS = f"query.{ACTION}"


class Watched(WrappedGrid):
    """Sees every message, for strategies of ours do without where they can."""

    def __init__(self, grid):
        super().__init__(grid)
        self.replies = []

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        replies = self.on_the_way(messages, replies) if messages else replies
        self.replies += replies
        return replies

    def on_the_way(self, messages, replies):
        return replies


def ours(method="fedavg+ridge_head", **keywords):
    keywords = {"fraction_evaluate": 0.0, "example": torch.zeros(2, 4), **keywords}
    return MergeStrategy(method, model_fn=plain_model, **keywords)


def run(strategy, wrap=lambda grid: grid, rounds=1, app=None, **grid):
    with SimulationGrid(app or client_app(plain_model, tiny_data, training=TRAINING), CLIENTS, **grid) as bare:
        around = wrap(bare)
        return strategy.start(around, initial(plain_model), num_rounds=rounds), around


def records(grid):
    """Names of all that clients sent, by kind of message."""
    found = defaultdict(set)
    for reply in grid.replies:
        for key, record in reply.content.items():
            found[reply.metadata.message_type] |= {f"{key}/{name}" for name in record}
    return dict(found)


MODEL = {f"arrays/{name}" for name in plain_model().state_dict()}
ANSWER = {
    "metrics/num-examples",
    "client/partition-id",
    "0.losses/losses",
    "0.counts/judged",
    "0.counts/examples",
    "0.counts/noise",
    "occasion/server-round",
    "occasion/exchange",
}


@pytest.mark.parametrize("privacy", [Privacy(masks=True), Privacy(noise=NOISE), BOTH])
def test_every_record_of_a_private_run_is_one_that_the_page_on_privacy_names(privacy):
    """A record that is added some day, and tells of examples, has to be protected or to be named there."""
    result, grid = run(ours(privacy=privacy, fraction_evaluate=1.0), Watched)
    found = records(grid)
    sums = {name for name in found.pop(QUESTIONS) if not name.startswith("0.statistics.head_sums")}
    assert sums == ANSWER
    told = {"metrics/num-examples", "metrics/local-steps", "client/partition-id"}
    assert found == {"train": MODEL | told}  # and nobody is asked to evaluate
    assert "train_loss" not in result.train_metrics_clientapp[1]
    assert not result.evaluate_metrics_clientapp


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_clients_that_train_without_messages_withhold_the_same(engine):
    seen, _ = run(ours(privacy=Privacy(masks=True)), engine=engine)
    told, _ = run(ours(privacy=Privacy(masks=True)), Watched)
    assert dict(seen.train_metrics_clientapp[1]) == dict(told.train_metrics_clientapp[1])
    assert list(seen.train_metrics_clientapp[1]) == ["local-steps"]
    open_run, _ = run(ours(), engine=engine)
    assert "train_loss" in open_run.train_metrics_clientapp[1]


def test_stages_of_a_merge_withhold_training_losses_as_well():
    _, grid = run(ours("fedma(class_aware=false)+ridge_head", privacy=Privacy(masks=True)), Watched)
    assert sum(reply.metadata.message_type == "train" for reply in grid.replies) > CLIENTS
    assert not any("train_loss" in name for name in records(grid)["train"])


def test_exact_metrics_are_sent_where_they_are_asked_for(caplog):
    result, _ = run(ours(privacy=Privacy(masks=True, exact_metrics=True), fraction_evaluate=1.0))
    assert result.train_metrics_clientapp[1]["train_loss"] > 0
    assert result.evaluate_metrics_clientapp[1]["eval_loss"] > 0
    assert "keep training losses to themselves" not in caplog.text
    run(ours(privacy=Privacy(masks=True), fraction_evaluate=1.0))
    assert "keep training losses to themselves, and are not asked to judge the model" in caplog.text


def test_who_relies_on_masks_or_noise_is_told_what_they_do_not_do(caplog):
    run(ours())
    assert "privacy:" not in caplog.text
    run(ours(privacy=Privacy(noise=NOISE)))
    assert "privacy:" not in caplog.text
    run(ours("fedavg", privacy=Privacy(masks=True)))
    assert "masks are simulated: this server makes them" in caplog.text
    assert "the method asks clients for nothing beyond their models" in caplog.text


def test_batch_norms_are_not_measured_exactly_beside_masks_or_noise():
    with pytest.raises(InvalidOption, match="exact means and variances"):
        ours(privacy=Privacy(noise=NOISE), batch_norm="recalibrate")
    section = {"masks": True}
    with pytest.raises(InvalidOption, match="exact means and variances"):
        make_config({"methods": ["fedavg+ridge_head"], "privacy": section, "batch_norm": "recalibrate"})


class Late(Watched):
    """Client 1's first answer arrives with the answers to the next exchange, before its own."""

    held = ()

    def on_the_way(self, messages, replies):
        if messages[0].metadata.message_type != QUESTIONS:
            return replies
        exchange = messages[0].content["config"]["exchange"]
        late, self.held = self.held, [one for one in replies if exchange == 0 and one.metadata.src_node_id == self.node]
        return [*late, *(one for one in replies if one not in self.held)]

    @property
    def node(self):
        return sorted(self.get_node_ids())[1]


class Silent(Late):
    """It never arrives."""

    @property
    def held(self):
        return ()

    @held.setter
    def held(self, value):
        self.gone = value

    def on_the_way(self, messages, replies):
        found = super().on_the_way(messages, replies)
        return [one for one in found if one not in getattr(self, "gone", ())]


@pytest.mark.parametrize("privacy", [Privacy(), Privacy(masks=True)])
def test_a_late_answer_is_not_opened_and_does_not_stand_in_the_place_of_its_clients_own(privacy, caplog):
    late, _ = run(ours(privacy=privacy), Late)
    assert re.search(r"clients? \[?1", caplog.text)
    silent, _ = run(ours(privacy=privacy), Silent)
    one, other = from_arrays(late.arrays), from_arrays(silent.arrays)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_answer_of_the_round_before_is_not_opened(monkeypatch):
    opened = []

    def noted(content, questions):
        opened.append(content)
        return read_answers(content, questions)

    class Repeated(Watched):
        first = None

        def on_the_way(self, messages, replies):
            if messages[0].metadata.message_type != QUESTIONS:
                return replies
            if self.first is None:
                self.first = replies[0]
                return replies
            late = [self.first] if messages[0].content["config"]["server-round"] == 2 else []
            return [*late, *replies]

    monkeypatch.setattr(questions, "read_answers", noted)
    _, grid = run(ours(), Repeated, rounds=2)
    assert len(opened) == 4 * CLIENTS  # two exchanges a round
    assert sum(content is grid.first.content for content in opened) == 1


def test_answers_asked_again_are_billed_and_add_up_over_rounds():
    """The noise is shared by two of three, so that the others are asked again where one is late."""
    noise = NoisySums(clip=2.0, noise_multiplier=0.05, sharers=2)
    strategy = ours(privacy=Privacy(masks=True, noise=noise))
    run(strategy, Late, rounds=3)
    assert strategy.last_report.answers == 3
    assert strategy.answers == 9


def test_answers_of_a_round_that_merged_nothing_are_billed():
    """A mod stops the second exchange of a round, after the first has been answered."""
    mod, calls = LocalDpMod(clipping_norm=1.0, sensitivity=0.0, epsilon=1.0, delta=0.5), []

    def at_the_judgement(message, context, call_next):
        config = message.content.get("config")
        if config is not None and config.get("exchange") == 1:
            calls.append(config["server-round"])
            return mod(message, context, call_next)
        return call_next(message, context)

    strategy = ours(privacy=Privacy(noise=NOISE), on_too_few="skip")
    with pytest.raises(NothingMerged):
        run(strategy, rounds=2, app=tiny_app(at_the_judgement, model_fn=plain_model))
    assert set(calls) == {1, 2}
    assert strategy.last_report.skipped
    assert (strategy.last_report.answers, strategy.answers) == (2, 4)


def test_answers_of_a_round_that_is_cut_short_and_run_again_are_billed_twice(tmp_path):
    class Died(BaseException):
        pass

    class Dying(Watched):
        def on_the_way(self, messages, replies):
            if messages[0].content["config"].get("server-round") == 2 and "0.base" in messages[0].content:
                raise Died  # the clients have answered
            return replies

    settings = {"privacy": Privacy(noise=NOISE), "checkpoint_dir": tmp_path}
    with pytest.raises(Died):
        run(ours(**settings), Dying, rounds=3)
    again = ours(**settings)
    run(again, rounds=3)
    assert again.answers == 2 + 1 + 2 + 2
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"round": 4, "ques')  # a line cut short was never asked
    finished = ours(**settings)
    run(finished, rounds=3)
    assert finished.answers == 7
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()[:-1]
    assert [json.loads(line)["round"] for line in lines] == [1, 1, 2, 2, 2, 3, 3]


def test_more_sharers_than_clients_are_refused_before_anybody_trains():
    noise = NoisySums(clip=2.0, noise_multiplier=1.0, sharers=CLIENTS + 1)

    class Unused(Watched):
        def on_the_way(self, messages, replies):
            raise AssertionError("a client was asked")

    with pytest.raises(InvalidOption, match="3 clients take part, and 4 are needed"):
        run(ours(privacy=Privacy(masks=True, noise=noise)), Unused)


def test_a_record_holds_no_metrics_that_clients_keep_to_themselves(tmp_path):
    settings = {
        "methods": ["fedavg+ridge_head"],
        "rounds": 1,
        "data": {"name": "digits"},
        "partition": {"clients": 2},
        "training": {"epochs": 1},
        "workers": 1,
    }
    for name, privacy in (("kept", {"masks": True}), ("told", {"masks": True, "exact_metrics": True})):
        (folder,), failed = compare(make_config(settings, {"privacy": privacy}), tmp_path / name, lambda row: None)
        assert not failed
        rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()][1:]
        assert [row["train_loss"] is None for row in rows] == [name == "kept"]
        assert [row["client_accuracy"] is None for row in rows] == [name == "kept"]
        assert [row["answers"] for row in rows] == [2]
