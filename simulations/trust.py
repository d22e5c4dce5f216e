"""What one hostile client costs: every method, one liar among five honest ones: python -m simulations.trust [OUT].

Run it in the repository's folder, for the kinds of hostile clients are those of the tests (``tests/hostile``). Six
clients with Dirichlet(1.0) parts of scikit-learn's digits train a small MLP from one start; each method merges once,
with all of them honest, without the third, and with the third lying in every way. OUT (runs/trust) gets
``trust.json`` with every accuracy, and ``trust.md``, the tables. A quarter of an hour on one core; names of methods
behind OUT run these alone.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import fedmerge
from fedmerge.data import PartitionSettings, load_dataset, make_partition
from fedmerge.models import build_model
from fedmerge.models.resize import resize
from fedmerge.strategies import client_app
from fedmerge.training import LocalTraining
from fedmerge.training.judged import judge
from fedmerge.wire.record_values import from_arrays
from tests.contract.table import Row
from tests.fuzz.guard import quiet
from tests.hostile.kinds import Kind
from tests.hostile.rounds import CLIENTS, TABLES, Federation, tables_of

SEED, PLACE, ALPHA, HIDDEN = 0, 2, 1.0, [32]
TRAINING = LocalTraining(epochs=10, learning_rate=0.05, batch_size=32)
SHOWN = 64  # of the test set are on the server, for methods that want inputs there; the others judge
MARGIN = 3.0
"""Points of accuracy by which a liar may pull a method below leaving it out."""
REFINED = ("natural_gradient", "ridge_head", "logistic_head", "sequential_refit", "recalibrate")
METHODS = (*fedmerge.methods(), "fedavg+server_momentum", *(f"fedavg+{name}" for name in REFINED))
SLOW = ("rebasin", "otfusion", "gamf", "c2m3", "zipit", "cca", "pfnm", "fedma", "mats", "geometric_median")
ASKING = ("fedkfac", *(f"fedavg+{name}" for name in REFINED))
EVERY = {**dict.fromkeys(SLOW, 4), **dict.fromkeys(ASKING, 12)}
"""Methods that take their time meet every lie that nothing can tell, and one of so many other kinds."""


class Problem:
    """The data, and who has what."""

    def __init__(self) -> None:
        self.data = load_dataset("digits")
        self.parts = make_partition(self.data, PartitionSettings("dirichlet", clients=CLIENTS, alpha=ALPHA), SEED)

    def model(self) -> torch.nn.Module:
        """The start of all clients."""
        return build_model("mlp", self.data.input_shape, self.data.num_classes, seed=SEED, hidden=HIDDEN)

    def client(self, partition: int, total: int) -> Any:
        """A client's examples."""
        return self.parts.client_data(self.data, partition)

    def federation(self, method: str) -> Federation:
        """A method, and six clients that have trained for it."""
        x, y = self.data.test_x[:SHOWN], self.data.test_y[:SHOWN]
        app = client_app(self.model, self.client, training=TRAINING)
        return Federation(
            Row(method), self.model, app=app, data=[(x, y)], example=x[:2], repair="auto", seed=SEED
        )  # fmt: skip

    def accuracy(self, arrays: Any) -> float:
        """Of a merged model on the rest of the test set, in percent; 0 where there is none."""
        if arrays is None:
            return 0.0
        x, y = self.data.test_x[SHOWN:], self.data.test_y[SHOWN:]
        return 100 * judge(resize(self.model(), from_arrays(arrays)).eval(), x, y, what="digits").accuracy


def kinds_for(method: str) -> list[Kind]:
    """What is tried on a method."""
    kinds = [kind for name in dict.fromkeys(tables_of(Row(method))) for kind in TABLES[name].values()]
    return [kind for i, kind in enumerate(kinds) if kind.lie or i % EVERY.get(method, 1) == 0]


def study(problem: Problem, method: str) -> dict[str, Any]:
    """A row for each kind, with what the method is without liars."""
    federation = problem.federation(method)
    honest = problem.accuracy(federation.merged(federation.known.replies())[0])
    left = problem.accuracy(federation.without(PLACE))
    rows = []
    for kind in kinds_for(method):
        fate = federation.round(kind, PLACE, random.Random(SEED))
        if fate.how == "none":
            continue
        accuracy = round(problem.accuracy(federation.last), 1)
        facts = {"kind": str(kind), "must be dropped": kind.must_drop, "fate": fate.how, "fault": fate.fault}
        rows.append({**facts, "accuracy": accuracy, "harms": accuracy < min(honest, left) - MARGIN})
    return {"method": method, "honest": round(honest, 1), "left out": round(left, 1), "rows": rows}


def markdown(studies: list[dict[str, Any]]) -> str:
    """Three tables: by method, by lie, and what is not as it should be."""
    lines = ["| method | all honest | one left out | kinds | dropped | taken | ended | worst that had to be dropped |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    prices: dict[str, dict[str, float]] = {}
    wrong = []
    for result in studies:
        fates = Counter(row["fate"] for row in result["rows"])
        accuracies = [row["accuracy"] for row in result["rows"] if row["must be dropped"] or row["fate"] == "dropped"]
        numbers = [
            len(result["rows"]),
            fates["dropped"],
            fates["accepted"],
            fates["ended"],
            min(accuracies, default=0.0),
        ]
        cells = [f"`{result['method']}`", result["honest"], result["left out"], *numbers]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        for row in result["rows"]:
            if row["fault"] or (row["harms"] and (row["must be dropped"] or row["fate"] != "accepted")):
                wrong.append(
                    f"- `{result['method']}`, {row['kind']}: {row['fault'] or row['fate']}, {row['accuracy']} %"
                )
            elif row["harms"]:
                prices.setdefault(row["kind"], {})[result["method"]] = row["accuracy"] - result["left out"]
    lines += ["", "| a lie that passes for honest | what it costs, in points, where that is more than three |"]
    lines.append("| --- | --- |")
    for kind, costs in sorted(prices.items()):
        names = [f"`{name}` {-cost:.0f}" for name, cost in sorted(costs.items(), key=lambda pair: pair[1])]
        lines.append(f"| {kind} | {', '.join(names)} |")
    return "\n".join([*lines, "", f"Not as it should be: {len(wrong)}", *wrong, ""])


def main() -> None:
    """Run, and write as results come."""
    arguments = sys.argv[1:]
    out = Path(arguments.pop(0) if arguments else "runs/trust")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    problem, studies = Problem(), []
    with quiet():
        for method in arguments or METHODS:
            result = study(problem, method)
            studies.append(result)
            fates = Counter(row["fate"] for row in result["rows"])
            print(
                f"{method}: all honest {result['honest']}, one left out {result['left out']}, {dict(fates)}", flush=True
            )
            (out / "trust.json").write_text(json.dumps(studies, indent=1) + "\n")
            (out / "trust.md").write_text(markdown(studies))


if __name__ == "__main__":
    main()
