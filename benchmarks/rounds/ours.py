"""fedmerge by its public road: a strategy that starts on a SimulationGrid, with our ClientApp."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ArrayRecord, MetricRecord
from torch import nn

from benchmarks.rounds.task import Pause, Task
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.workers.cohort_work import Engine
from fedmerge.strategies import FedAvg, client_app, from_arrays, to_arrays
from fedmerge.strategies.order import Answer, Order
from fedmerge.training import LocalTraining

__all__ = ["run"]


@dataclass(frozen=True)
class _ModelFn:
    """Makes the model; travels to workers as settings."""

    task: Task

    def __call__(self) -> nn.Module:
        return self.task.model()


class _Grid(SimulationGrid):
    """Notes which engine it chose, for the report."""

    engine = ""

    def train(self, order: Order, *, timeout: float | None = None) -> Answer:
        answer = super().train(order, timeout=timeout)
        if answer.engine is not None:
            self.engine = answer.engine.name
        return answer


def run(task: Task, pause: Pause, engine: Engine = "auto") -> None:
    """Run the strategy; its evaluation on the server is where it waits for the next round."""
    workload = task.workload
    app = client_app(
        _ModelFn(task),
        task.data_fn,
        training=LocalTraining(
            learning_rate=workload.learning_rate, momentum=0.0, epochs=1, batch_size=workload.batch_size
        ),
        device=task.device,
    )
    strategy = FedAvg(
        seed=task.seed,
        fraction_train=workload.sampled / workload.clients,
        min_train_nodes=workload.sampled,  # the fraction may round down by one
        min_available_nodes=workload.clients,
        fraction_evaluate=0.0,
    )

    def evaluated(round: int, arrays: ArrayRecord) -> MetricRecord | None:
        pause(round, lambda: from_arrays(arrays), grid.engine)
        return None

    with _Grid(app, workload.clients, workers=task.workers, engine=engine) as grid:
        initial = to_arrays(task.model().state_dict())
        strategy.start(grid, initial, num_rounds=task.rounds, evaluate_fn=evaluated)
