"""What a strategy of ours does beside merging: draws nodes, and has clients judge the model."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedmerge.errors import ClientFailed
from fedmerge.merging import Pipeline
from fedmerge.strategies.client_metrics import figures_of, judged, worst_tenth
from fedmerge.strategies.failures import failures_in
from fedmerge.strategies.heard import Sent, heard
from fedmerge.strategies.identity import Identities
from fedmerge.strategies.own_models import OwnModels
from fedmerge.strategies.participation import sample_nodes
from fedmerge.strategies.policies import RoundFailures, RoundPolicies
from fedmerge.strategies.travel import Travel
from fedmerge.wire.flower_records import view_arrays

__all__ = ["EvaluatedByClients"]


class EvaluatedByClients(FlowerFedAvg):
    """Flower's FedAvg with seeded draws, whose clients are named where they fail to evaluate."""

    seed: int
    pipeline: Pipeline
    policies: RoundPolicies
    identities: Identities
    last_evaluation: MetricRecord | None = None
    """What clients found on their held-out examples in the last round; None where nobody looked."""
    worst_accuracy: float | None = None
    """The mean accuracy among the tenth of these clients that has the lowest, or of the one, where they are few."""
    _asked_to_judge: Sent | None
    _own_models = OwnModels()
    travel: Travel

    def _sampled(self, grid: Grid, fraction: float, least: int, purpose: str, round: int) -> list[int]:
        return sample_nodes(
            grid, fraction, least, self.min_available_nodes, seed=self.seed, purpose=purpose, round=round
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the merged model to those who judge it on their held-out examples; to each its own, where it has one."""
        self.identities.grid, self._asked_to_judge, self.last_evaluation = grid, Sent(()), None
        self.worst_accuracy = None
        if self.fraction_evaluate == 0.0 or self.pipeline.privacy.withholds_metrics:
            return []
        config["server-round"] = server_round
        if self.pipeline.batch_norm == "local":
            config["batch-norm"] = "local"
        share, least = self.fraction_evaluate, self.min_evaluate_nodes
        nodes = self._sampled(grid, share, least, "evaluation sampling", server_round)
        config.update(self.travel.told(view_arrays(arrays)))
        if self._own_models.parts:
            own = ((node, self._own_models.judged_by(node, arrays)) for node in nodes)
            messages = [
                message for node, model in own for message in self._messages_to([node], model, config, "evaluate")
            ]
        else:
            messages = self._messages_to(nodes, arrays, config, "evaluate")
        self._asked_to_judge = Sent(nodes, messages)
        return messages

    def _records(self, arrays: ArrayRecord, config: ConfigRecord) -> tuple[RecordDict, RecordDict]:
        """What a message brings with the tensors that travel, and with all."""
        config_key, down = self.configrecord_key, self.travel.down(arrays)
        brief = RecordDict({self.arrayrecord_key: down, config_key: config})
        return brief, brief if down is arrays else RecordDict({self.arrayrecord_key: arrays, config_key: config})

    def _messages_to(self, nodes: list[int], arrays: ArrayRecord, config: ConfigRecord, kind: str) -> list[Message]:
        """A message to each, with the tensors that it needs."""
        brief, whole = self._records(arrays, config)
        records = ((node, brief if self.travel.completes(node) else whole) for node in nodes)
        return [message for node, record in records for message in self._construct_messages(record, [node], kind)]

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
