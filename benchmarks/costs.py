"""What a round on Ray costs beside training: the figures of docs/scaling.md.

    python benchmarks/costs.py [--megabytes 1 40 160] [--workers 2] [--repeats 10]

Prints for each size of model: seconds to put an order into the object store, to fetch it in a worker, to answer an
order of no work (the round trip of a piece), to bring one sum back, and to join two sums; medians of wall time.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import ray
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import nn

from fedmerge.data import ClientData
from fedmerge.merging import build_pipeline
from fedmerge.simulation.workers.flower_task import FIRST_NODE
from fedmerge.simulation.workers.ray_actor import train_on
from fedmerge.simulation.workers.ray_workers import RayWorkers
from fedmerge.strategies import client_app, to_arrays
from fedmerge.strategies.order import Order
from fedmerge.training import LocalTraining
from fedmerge.update import MergeContext

SIDE = 512


class Model(nn.Module):
    """Weights of the size asked for, of which one is used: training costs next to nothing."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.used = nn.Linear(2, 2)
        self.rest = nn.ParameterList(torch.zeros(SIDE, SIDE) for _ in range(megabytes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 40, 160])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    workers = RayWorkers(arguments.workers, engine="serial")
    try:
        for megabytes in arguments.megabytes:
            costs = _costs(workers, megabytes, arguments.repeats)
            print(f"{megabytes:5d} MB  " + "  ".join(f"{name} {1e3 * s:8.2f} ms" for name, s in costs.items()))
    finally:
        workers.close()


def _costs(workers: RayWorkers, megabytes: int, repeats: int) -> dict[str, float]:
    def model() -> nn.Module:
        return Model(megabytes)

    def data(client: int, total: int) -> ClientData:
        x, y = torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
        return ClientData(x, y, x[:0], y[:0])

    workers.use(client_app(model, data, training=LocalTraining(steps=1)))
    base = model().state_dict()
    content = RecordDict({"arrays": to_arrays(base), "config": ConfigRecord()})
    order = Order(content, [FIRST_NODE], build_pipeline("fedavg"), MergeContext(base=base), None)

    def put() -> list[object]:
        return [ray.put(order.without_model())]

    def one(payload: list[object]) -> object:
        return train_on(workers._pool, [workers._app], payload, order, order.nodes, 1, "serial")

    payload = put()
    one(payload)
    first, again = _seconds(lambda: one(put()), repeats), _seconds(lambda: one(payload), repeats)
    partials = [one(payload).partial for _ in range(2)]
    return {
        "put": _seconds(put, repeats),
        "fetch": first - again,
        "one client and its sum back": again,
        "join": _seconds(lambda: order.pipeline.join(*partials), repeats),
    }


def _seconds(call: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
