"""How many files of the package a reader crosses to follow one round.

    python benchmarks/round_files.py [--methods fedavg fedkfac] [--list]

Runs each method in this process on a tiny federation, one round to warm up and one that is watched: ``sys.setprofile``
sees every call, and each file of fedmerge counts that a call comes from or goes to. What runs only because a module is
imported does not count.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord
from torch import nn

import fedmerge
from fedmerge.data import ClientData
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import MergeStrategy, client_app, to_arrays
from fedmerge.training import LocalTraining

PACKAGE = str(Path(fedmerge.__file__).parent)
CLIENTS = 3


class Watch:
    """Notes the files of the package that calls come from or go to."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def __call__(self, frame: FrameType, event: str, _value: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            caller = frame.f_back
            self._note(frame)
            # Who imports a module, or defines a class, does nothing in the round.
            if caller is not None and caller.f_code.co_name != "<module>" and self._is_ours(frame):
                self._note(caller)
        elif event == "c_call":
            self._note(frame)

    @staticmethod
    def _is_ours(frame: FrameType) -> bool:
        return frame.f_code.co_filename.startswith(PACKAGE)

    def _note(self, frame: FrameType) -> None:
        if self._is_ours(frame) and frame.f_code.co_name != "<module>":
            self.files.add(str(Path(frame.f_code.co_filename).relative_to(PACKAGE)))


def model() -> nn.Module:
    """Two linear layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def data(client: int, _total: int) -> ClientData:
    """A few examples, others for each client."""
    draws = torch.Generator().manual_seed(client)
    x, y = torch.randn(12, 4, generator=draws), torch.randint(0, 3, (12,), generator=draws)
    return ClientData(x[:8], y[:8], x[8:], y[8:])


def files_of(method: str, engine: str = "serial") -> set[str]:
    """The files that the second of two rounds crosses."""
    app = client_app(model, data, training=LocalTraining(epochs=1, batch_size=4))
    strategy = MergeStrategy(method, model_fn=model, example=torch.zeros(2, 4), fraction_evaluate=0.0)
    watch = Watch()

    def warm(round: int, _arrays: ArrayRecord) -> MetricRecord | None:
        sys.setprofile(watch if round == 1 else None)
        return None

    with SimulationGrid(app, CLIENTS, engine=engine) as grid:
        strategy.start(grid, to_arrays(model().state_dict()), num_rounds=2, evaluate_fn=warm)
    return {name for name in watch.files if "round_files" not in name}


def main(show: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["fedavg", "fedkfac"])
    parser.add_argument("--engine", default="serial", choices=["serial", "stacked"])
    parser.add_argument("--list", action="store_true", help="name the files too")
    arguments = parser.parse_args()
    for method in arguments.methods:
        files = files_of(method, arguments.engine)
        show(f"{method}: {len(files)} files")
        if arguments.list:
            show("\n".join(f"    {name}" for name in sorted(files)))


if __name__ == "__main__":
    main()
