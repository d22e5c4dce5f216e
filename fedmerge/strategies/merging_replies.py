"""What a strategy of ours makes of replies: the next global model, and what clients found when they judged it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedmerge.errors import BadUpdate, ClientFailed, NoUsableUpdates
from fedmerge.questions.stages import News, Stage
from fedmerge.refine.budget import Billed
from fedmerge.strategies.client_metrics import alike, figures_of, judged, worst_tenth
from fedmerge.strategies.failures import check_mods, failed_client, failures_in
from fedmerge.strategies.heard import Sent, heard
from fedmerge.strategies.merge_report import MergeReport
from fedmerge.strategies.missed_replies import keeping_missed, noted
from fedmerge.strategies.order import Answer
from fedmerge.strategies.ordering import OrdersRounds
from fedmerge.strategies.own_models import OwnModels
from fedmerge.strategies.policies import RoundFailures
from fedmerge.strategies.reach import Reach, ask, exchange
from fedmerge.strategies.recalibration import recalibrate
from fedmerge.strategies.resume import StrategyCheckpoints
from fedmerge.strategies.rounds import read_replies
from fedmerge.strategies.run_outcome import WITHHELD, RunOutcome, too_few
from fedmerge.update import ClientUpdate, MergeContext
from fedmerge.wire.flower_records import WITHHOLD_KEY
from fedmerge.wire.keys import KEEP_KEY, LINEARISED_KEY
from fedmerge.wire.record_values import to_arrays

__all__ = ["MergesReplies"]

log = logging.getLogger("fedmerge")


class MergesReplies(OrdersRounds):
    """Merges what clients sent, in client order, and keeps account of who failed; failures are named."""

    answers: int
    last_report: MergeReport | None
    _checkpoints: StrategyCheckpoints | None
    _run: RunOutcome
    _done: int | None

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message] | Answer
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge what clients sent into the next global model: their replies, or what a grid of ours made of an order.

        Raises
        ------
        NoUsableUpdates
            Too few clients replied with an update that can be merged, under ``on_too_few="raise"``.
        ClientFailed
            One failed, under ``on_client_error="raise"``.
        """
        arrays_key, weight_key, self._awaited = self.arrayrecord_key, self.weighted_by_key, None
        answer = replies if isinstance(replies, Answer) else self._read(server_round, replies)
        failures, layout = RoundFailures(self.policies), self.travel.layout
        told: dict[str, Any] = {"server-round": server_round}
        if self.pipeline.linearises:
            told[LINEARISED_KEY] = list(self.pipeline.linearises)
        if self.travel.still:
            nodes = answer.nodes.values()
            self.travel.note(nodes, answer.replies, arrays_key)
            told |= self.travel.told(self._base or {})
            layout = layout if self.travel.completes(*nodes) else None
        if answer.failures:
            name = self.identities.naming(server_round)
            failures.note([failed_client(node, reason, server_round, name) for node, reason in answer.failed])
            check_mods(answer.heard)
        if answer.empty:
            reason = "no client replied with an update" if failures.clients else "no client was asked"
            return self._skipped(server_round, reason, (), failures.clients)
        keys, late = (arrays_key, self.configrecord_key, weight_key), self.policies.round_timeout

        def reach(**more: int) -> Reach:
            """The clients, for a method that asks them again, told `more` in every message."""
            return Reach(self._grid, answer.nodes, {**told, **more}, *keys, late, server_round, failures.note, layout)

        def stage(sent: Mapping[int, News], what: Stage) -> list[ClientUpdate]:
            more = {"seed": self.seed, KEEP_KEY: self.pipeline.compares}
            more |= {WITHHOLD_KEY: True} if self.pipeline.privacy.withholds_metrics else {}
            return exchange(reach(**more), sent, what)

        exchanges = count()
        asked = Billed(lambda them, who: ask(reach(), exchanges, them, who), partial(self._charge, server_round))
        context = MergeContext(
            base=self._base,
            round=server_round,
            seed=self.seed,
            data=self._data,
            example=self._example,
            model_fn=self.travel.merged_model if self.travel.model_fn else None,
            exchange=stage,
            ask=asked,
            population=None if self._order is None else self._order.context.population,
            **self.travel.facts,
        )
        try:
            result = answer.merge(self.pipeline, context, self.memory, self.travel.buffers)
        except NoUsableUpdates as error:
            return self._skipped(server_round, str(error), error.dropped, failures.clients, asked.questions)
        taken = set(result.accepted)
        if self.pipeline.batch_norm == "recalibrate":
            recalibrate(reach(), result.state, result.accepted, self.travel.norms)
        self.memory = keeping_missed(result.memory, self.memory) if self.memory else result.memory
        if answer.nodes:  # a grid may name none
            self._note_merged(server_round, {node for client, node in answer.nodes.items() if client in taken})
        owned = OwnModels.of(result, answer.nodes, self._base, context.tied) if result.memory else None
        self._own_models = owned
        if answer.contents:
            contents = [content for client, content in answer.contents.items() if client in taken]
            metrics = self.train_metrics_aggr_fn(alike(contents), self.weighted_by_key)
        else:
            metrics = answer.metrics(taken)
        self.last_report = MergeReport(
            server_round,
            result.accepted,
            result.dropped,
            answers=asked.questions,
            failed=tuple(failures.clients),
            refused=result.refused,
            steps_skipped=result.skipped,
            bytes_personal=0 if self._own_models is None else self._own_models.bytes,
            metrics=dict(metrics or {}),
        )
        arrays = to_arrays(result.state)
        if self._checkpoints is not None:
            self._checkpoints.save(server_round, arrays, self.memory, self.identities, self._lasting())
        return arrays, metrics

    def _read(self, round: int, replies: Iterable[Message]) -> Answer:
        order, keys = self._order, (self.arrayrecord_key, self.weighted_by_key)
        sent = None if order is None else Sent(order.nodes, order.messages(), order.before)
        return read_replies(replies, sent, keys, round, self.identities)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the merged model to those who judge it on their held-out examples.

        Raises
        ------
        NoUsableUpdates
            A wrapper kept this round's replies, as Flower's for differential privacy do where a client failed, under
            ``on_too_few="raise"``.
        """
        if self._awaited == server_round:
            self._awaited = None
            self._skipped(server_round, WITHHELD, (), ())
        return super().configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average what clients found on their held-out examples; those that hold none do not count, nor does what
        comes from a node that was not asked, or twice.

        Raises
        ------
        ClientFailed
            One could not evaluate, under ``on_client_error="raise"``.
        """
        found = heard(replies, self._asked_to_judge)
        failures, known = RoundFailures(self.policies), self.identities
        failed = failures_in(found, server_round, known.naming(server_round))
        strays = [(known.holder(stray.node, server_round), stray.reason) for stray in found.strays]
        failures.note([*failed, *(ClientFailed(one, server_round, why) for one, why in strays)], "evaluation")
        counted = judged((message for _, message in found.replies), self.weighted_by_key)
        figures = figures_of(counted, self.travel.facts.get("task"))
        self.worst_accuracy = worst_tenth(counted, "eval_acc")
        self.last_evaluation = super().aggregate_evaluate(server_round, counted)
        if self.last_evaluation is not None:
            self.last_evaluation.update(figures)
        return self.last_evaluation

    def _lasting(self) -> dict[str, Any]:
        """All that must not change between the rounds of one run, as JSON can hold it."""
        return {
            "method": repr(self.pipeline),
            "fraction_train": self.fraction_train,
            "fraction_evaluate": self.fraction_evaluate,
            "min_train_nodes": self.min_train_nodes,
            "min_available_nodes": self.min_available_nodes,
            "weighted_by_key": self.weighted_by_key,
            "seed": self.seed,
            **self.travel.settings(),
        }

    def _note_merged(self, round: int, nodes: Collection[int]) -> None:
        """Remember whose replies were merged, where clients keep what goes with them."""
        rule = self.pipeline.local_rule
        if rule is not None and rule.keeps and self._order is not None:
            self.memory = noted(self.memory, self._order.nodes, nodes, round)

    def _charge(self, round: int, questions: int) -> None:
        self.answers += questions
        if self._checkpoints is not None:
            self._checkpoints.charge(round, questions)

    def _skipped(
        self,
        round: int,
        reason: str,
        dropped: Sequence[BadUpdate],
        failed: Sequence[ClientFailed],
        answers: int = 0,
    ) -> tuple[None, None]:
        """Keep the model as it is, which is what Flower makes of no arrays, where that is the policy."""
        if self.fraction_train == 0.0:  # nobody is to train
            return None, None
        self._note_merged(round, ())
        error = too_few(round, reason, dropped, failed)
        self._run.skip(error)
        told = str(error).removeprefix(f"round {round}: ")
        self.last_report = MergeReport(round, (), error.dropped, skipped=told, answers=answers, failed=error.failed)
        asked = self._order is not None and len(self._order.nodes) > 0
        if self.policies.on_too_few == "raise" and (asked or failed or dropped):
            raise error
        log.warning("round %d: the model stays as it is: %s", round, reason)
        return None, None
