"""What a strategy of ours does beside merging: draws nodes, and has clients judge the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedmerge.pipeline import Pipeline
from fedmerge.strategies.client_metrics import judged
from fedmerge.strategies.failures import failures_in
from fedmerge.strategies.policies import RoundFailures, RoundPolicies
from fedmerge.strategies.sampling import sample_nodes

__all__ = ["EvaluatedByClients"]


class EvaluatedByClients(FlowerFedAvg):
    """Flower's FedAvg with seeded draws, whose clients are named where they fail to evaluate."""

    seed: int
    pipeline: Pipeline
    policies: RoundPolicies
    _asked_to_judge: Sequence[int] = ()

    def _sampled(self, grid: Grid, fraction: float, least: int, purpose: str, round: int) -> list[int]:
        return sample_nodes(
            grid, fraction, least, self.min_available_nodes, seed=self.seed, purpose=purpose, round=round
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the merged model to those who judge it on their held-out examples."""
        self._asked_to_judge = ()
        if self.fraction_evaluate == 0.0 or self.pipeline.privacy.withholds_metrics:
            return []
        config["server-round"] = server_round
        if self.pipeline.batch_norm == "local":
            config["batch-norm"] = "local"
        share, least = self.fraction_evaluate, self.min_evaluate_nodes
        self._asked_to_judge = nodes = self._sampled(grid, share, least, "evaluation sampling", server_round)
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return self._construct_messages(record, nodes, "evaluate")

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average what clients found on their held-out examples; those that hold none do not count.

        Raises
        ------
        ClientFailed
            One could not evaluate, under ``on_client_error="raise"``.
        """
        known = list(replies)
        failures = RoundFailures(self.policies)
        failures.note(failures_in(known, self._asked_to_judge, server_round), "evaluation")
        return super().aggregate_evaluate(server_round, judged(known, self.weighted_by_key))
