"""Rounds with one hostile client among five honest ones, by any method, and what became of them.

A round is what a Flower server does with replies: decode, check, merge, and ask clients again where the method does.
"""

from __future__ import annotations

import logging
import random
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import nn

from fedmerge import FedMergeError
from fedmerge.wire.question_records import read_answers, read_question, write_answer
from fedmerge.wire.record_values import from_arrays
from tests.answered import Asked, OddModel, answer, shallow
from tests.contract.table import ROWS, Row
from tests.fuzz.guard import Hangs, limited, quiet
from tests.hostile.kinds import ANSWERS, IDENTITY, METRICS, STATES, STATISTICS, WEIGHTS, Kind, hostile_reply

CLIENTS = 6
"""One of them hostile."""
SECONDS = 60
"""Longest that a round may take; machines that do other things beside are slow."""
PLACES = (0, 2, 5)
"""Of the hostile client: the first, one in the middle, the last."""
IMPERSONATIONS = ("another's partition", "a second reply as another")
"""May cost the client its part that they impersonate: nobody can tell who is who."""
TABLES = {"state": STATES, "weight": WEIGHTS, "metrics": METRICS, "statistic": STATISTICS, "answer": ANSWERS,
          "identity": IDENTITY}  # fmt: skip


class TiedModel(nn.Sequential):
    """Two layers that share their weight."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
        self[4].weight = self[2].weight


REFINED = tuple(
    Row(name)
    for name in ("fedkfac", "fedavg+natural_gradient", "fedavg+ridge_head", "fedavg+logistic_head",
                 "fedavg+sequential_refit", "fedavg+recalibrate", "fedma", "otfusion+recalibrate+ridge_head")
)  # fmt: skip
"""Methods of several exchanges, which the contract's table has without them."""
METHODS = (*ROWS, *REFINED)


def is_slow(row: Row) -> bool:
    """Whether a round takes more than a few hundredths of a second."""
    return row.traces or row in REFINED or row.method == "mats"


def tables_of(row: Row) -> list[str]:
    """Where a client can lie in a round of this method, twice where the method listens most."""
    pipeline = row.pipeline()
    found = ["state", "state", "weight", "metrics", "identity"]
    return found + ["statistic"] * 2 * bool(pipeline.needs) + ["answer"] * 4 * bool(pipeline.refinements)


def kinds_of(row: Row) -> list[Kind]:
    """All that a client can do in a round of this method."""
    return [kind for name in dict.fromkeys(tables_of(row)) for kind in TABLES[name].values()]


class Turncoat:
    """A grid on which one node lies in every exchange after the first."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.node: int | None = None
        self.kind: Kind | None = None
        self.rng = random.Random(0)
        self.lies = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def send_and_receive(self, messages, **keywords):
        """Replies, with that node's lies."""
        sent = list(messages)
        asked = {message.metadata.dst_node_id: message.content for message in sent}
        found = list(self.inner.send_and_receive(sent, **keywords))
        if self.kind is None:
            return found
        return [self._told(one, asked) if one.metadata.src_node_id == self.node else one for one in found]

    def _told(self, reply: Message, asked: dict[int, RecordDict]) -> Message:
        if not reply.has_content() or self.kind is None or self.node is None:
            return reply
        content = shallow(reply.content)
        asked_again = asked[self.node]
        numbers = [n for n in range(1000) if f"{n}.question" in asked_again.config_records]
        if numbers and self.kind.place == "answer":
            changed = self._answered(content, [read_question(asked_again, n) for n in numbers])
            if not changed:
                return reply
        else:
            model = self._model(asked_again, content)
            spoilt = None if model is None else hostile_reply(self.kind, self.rng, content, model)
            if spoilt is None:
                return reply
            content = spoilt
        self.lies += 1
        reply.content = content
        return reply

    def _answered(self, content: RecordDict, questions: list[Any]) -> bool:
        """Whether the kind has anything to say of any of the answers; then it is in their place."""
        found = [
            (number, self.kind(self.rng, honest, question))
            for number, (honest, question) in enumerate(zip(read_answers(content, questions), questions, strict=True))
        ]
        for number, answered in found:
            if answered is not None:
                for key in [key for key in content if key.startswith(f"{number}.")]:
                    del content[key]
                write_answer(content, number, answered)
        return any(answered is not None for _, answered in found)

    def _model(self, asked: RecordDict, content: RecordDict):
        """What a reply with a model is about; None where it has none."""
        key = next((key for key in content.array_records if "." not in key), None)
        statistic = any(key.startswith("statistics.") for key in content.array_records)
        return from_arrays(content.array_records[key]) if key else {} if statistic else None


@dataclass
class Told:
    """What was logged in a round."""

    texts: list[str] = field(default_factory=list)

    def left_out(self) -> bool:
        """Whether anybody's answer was left out."""
        return any("left out" in text or "dropped" in text for text in self.texts)


@contextmanager
def heard():
    """Collect warnings, and keep them off the screen."""
    told, logger = Told(), logging.getLogger("fedmerge")

    class Into(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.texts.append(record.getMessage())

    handler, before, passed = Into(), logger.level, logger.propagate
    others, logger.handlers, logger.propagate = logger.handlers, [handler], False
    logger.setLevel(logging.WARNING)
    torch_logger = logging.getLogger("torch._subclasses.fake_tensor")
    torch_level = torch_logger.level
    torch_logger.setLevel(logging.CRITICAL)
    try:
        yield told
    finally:
        logger.handlers, logger.propagate = others, passed
        logger.setLevel(before)
        torch_logger.setLevel(torch_level)


@dataclass(frozen=True)
class Fate:
    """What became of a round: ``dropped``, ``accepted``, ``ended`` or ``none`` where the kind says nothing here.

    ``fault`` says what went wrong, if anything did: the round ended, by a typed error or another; who must be dropped
    was not; another client was; or the model is not what it has to be.
    """

    how: str
    fault: str = ""


class Federation:
    """A method's strategy with six clients that have trained, ready for any number of rounds."""

    def __init__(self, row: Row, model_fn=OddModel, **keywords: Any) -> None:
        self.row = row
        with heard(), quiet():
            self.known = Asked(row.method, CLIENTS, model_fn, Turncoat, **{**row.options, **keywords})
        self.grid = self.known.grid
        self.model = from_arrays(self.known.arrays)
        pipeline = self.known.strategy.pipeline
        self.widths, self.exchanges = pipeline.aggregator.may_change_width, row in REFINED or bool(pipeline.refinements)
        self.last: ArrayRecord | None = None
        """What the last round gave."""
        self._without: dict[int, Any] = {}

    def merged(self, sent: list[Message]):
        """The model, and the report."""
        self.known.remind()
        self.known.strategy.memory = {}
        arrays, _ = self.known.strategy.aggregate_train(1, iter(sent))
        return arrays, self.known.strategy.last_report

    def without(self, place: int) -> ArrayRecord:
        """The merge of all but one."""
        if place not in self._without:
            self.grid.kind = None
            honest = self.known.replies()
            self._without[place], _ = self.merged(honest[:place] + honest[place + 1 :])
        return self._without[place]

    def round(self, kind: Kind, place: int, rng: random.Random) -> Fate:
        """One round in which the client at `place` lies, as `rng` draws."""
        honest = self.known.replies()
        nodes = [message.metadata.src_node_id for message in honest]
        sent = self._sent(kind, rng, honest, place)
        if sent is None:
            return Fate("none")
        left = self.without(place) if kind.place in ("state", "weight", "statistic", "metrics") else None
        self.grid.node, self.grid.rng, self.grid.lies = nodes[place], rng, 0
        self.last = None
        self.grid.kind = kind if self.exchanges else None
        try:
            with limited(SECONDS), heard() as told:
                arrays, report = self.merged(sent)
        except FedMergeError as error:
            return Fate("ended", f"ended by {type(error).__name__}: {str(error)[:160]}")
        except (Exception, Hangs) as error:
            return Fate("ended", f"untyped {type(error).__name__}: {str(error)[:160]} at {_place(error)}")
        finally:
            self.grid.kind = None
        self.last = arrays
        if arrays is None:
            return Fate("ended", f"ended: {report.skipped}")
        if kind.place == "answer":
            if not self.grid.lies:
                return Fate("none")
            how = "dropped" if told.left_out() else "accepted"
        else:
            how = "accepted" if place in report.accepted else "dropped"
        return Fate(how, self._fault(kind, place, how, arrays, report, left))

    def _sent(self, kind: Kind, rng: random.Random, honest: list[Message], place: int) -> list[Message] | None:
        if kind.place == "answer":
            return honest
        if kind.place == "identity":
            return kind(rng, honest, place)
        content = hostile_reply(kind, rng, honest[place].content, self.model)
        if content is None:
            return None
        sent = list(honest)
        sent[place] = answer(honest[place].metadata.src_node_id, content)
        return sent

    def _fault(self, kind: Kind, place: int, how: str, arrays: ArrayRecord, report, left) -> str:
        missing = [one for one in range(CLIENTS) if one != place and one not in report.accepted]
        if missing and kind.name not in IMPERSONATIONS:
            return f"cost clients {missing} their part"
        if kind.must_drop and how == "accepted" and not (kind.wide and self.widths):
            return "obeyed what no honest client can have sent"
        state = from_arrays(arrays)
        if how == "dropped" and left is not None and not _equal(state, from_arrays(left)):
            return "was dropped and had its say all the same"
        return self._misshapen(state)

    def _misshapen(self, state) -> str:
        if list(state) != list(self.model):
            return "names changed"
        for name, tensor in state.items():
            want = self.model[name]
            if tensor.dtype != want.dtype or (tensor.shape != want.shape and not self.widths):
                return f"{name} became {tensor.dtype} {list(tensor.shape)}"
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                return f"{name} became infinite"
        return ""


def _equal(one, two) -> bool:
    return all(t.shape == two[n].shape and torch.equal(t, two[n]) for n, t in one.items())


def _place(error: BaseException) -> str:
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "/fedmerge/" in f.filename]
    return f"{ours[-1].filename.rpartition('/fedmerge/')[2]}:{ours[-1].lineno}" if ours else "outside"


@cache
def federation(row: int, tied: bool = False) -> Federation:
    """Of a method by its place in ``METHODS``: the same one for many rounds."""
    return Federation(METHODS[row], TiedModel if tied else OddModel)
