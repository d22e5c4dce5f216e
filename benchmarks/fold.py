"""Merge time of FedAvg: ours beside a bare torch sum and Flower's own, in turn within one run.

    python benchmarks/fold.py [--replies 20] [--parameters 2000000] [--repeats 5]

Prints CPU seconds per merge (median) and the ratio over the bare sum, which knows no wire format, no checks
and no buffers. "core" starts from tensors, "strategy" from Flower messages, as Flower's own does.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedmerge import ClientUpdate, MergeContext
from fedmerge.merging import build_pipeline
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.workers.flower_task import stamp
from fedmerge.strategies import FedAvg

TENSORS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replies", type=int, default=20)
    parser.add_argument("--parameters", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = arguments.parameters // TENSORS
    states = [{f"t{i}": torch.randn(size) for i in range(TENSORS)} for _ in range(arguments.replies)]
    systems = _systems(states)
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(arguments.repeats + 1):
        for name, merge in systems.items():
            started = time.process_time()
            merge()
            times[name].append(time.process_time() - started)
    medians = {name: statistics.median(each[1:]) for name, each in times.items()}
    for name, seconds in medians.items():
        print(f"{name:24s} {seconds:8.4f} s CPU   {seconds / medians['torch sum']:6.2f} x")


def _systems(states: list[dict[str, torch.Tensor]]) -> dict[str, Callable[[], object]]:
    updates = [ClientUpdate(i, state, 1.0 + i) for i, state in enumerate(states)]
    pipeline, context = build_pipeline("fedavg"), MergeContext(base=states[0])
    ours = FedAvg()
    grid = SimulationGrid(ClientApp(), 2)
    ours.configure_train(1, ArrayRecord(states[0]), ConfigRecord(), grid)
    replies = [_reply(i, state) for i, state in enumerate(states)]
    return {
        "torch sum": lambda: _torch_sum(states),
        "fedmerge core": lambda: pipeline.merge(updates, context),
        "fedmerge strategy": lambda: ours.aggregate_train(1, replies),
        "Flower's FedAvg": lambda: FlowerFedAvg().aggregate_train(1, replies),
    }


def _torch_sum(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    total = {name: tensor.clone() for name, tensor in states[0].items()}
    for i, state in enumerate(states[1:]):
        for name, tensor in state.items():
            total[name].add_(tensor, alpha=2.0 + i)
    return total


def _reply(node: int, state: dict[str, torch.Tensor]) -> Message:
    request = Message(RecordDict(), dst_node_id=node, message_type="train")
    stamp(request)
    metrics = MetricRecord({"num-examples": 1.0 + node})
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=request)


if __name__ == "__main__":
    main()
