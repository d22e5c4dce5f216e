"""Routed models and clients' own, from one pretrained base: python -m simulations.routed_models [OUT].

scikit-learn's digits, a base trained on 30 % of them, five clients with two classes each, five rounds of two epochs,
100 labelled examples on the server, five seeds. Accuracy on the clients' held-out examples, mean and worst client, and
on the test set of all classes, of what each method serves: routed models (``smear``, ``twin_merging``, ``wemoe``), a
model for each client (``pwe_moe``, ``emr``, ``tall_masks``, local training of as many epochs), or one for all
(``fedavg``, ``concrete``). OUT (runs/routed-models) gets the records and ``routed-models.csv``. Some minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedmerge.simulation import compare, make_config
from fedmerge.simulation.runs.base_training import pretrain
from fedmerge.simulation.runs.experiment import Experiment
from fedmerge.simulation.runs.unfinished import run_folder
from fedmerge.training.judged import evaluate, judge
from fedmerge.training.local import train

ROUNDS, EPOCHS, SEEDS = 5, 2, (0, 1, 2, 3, 4)
METHODS = (
    "fedavg",
    "emr",
    "tall_masks",
    "concrete(judge=server)",
    "smear",
    "twin_merging(kept=0.25)",
    "twin_merging(kept=0.25,by=clients)",
    "wemoe(objective=loss)",
    "wemoe",
    "pwe_moe",
)


def settings(out: Path, methods: tuple[str, ...] = METHODS, seeds: tuple[int, ...] = SEEDS) -> Any:
    """The configuration, once its base is there."""
    sections: dict[str, Any] = {
        "partition": {"scheme": "by_class_groups", "clients": 5, "held_out": 0.2},
        "model": {"name": "mlp", "options": {"hidden": [64]}},
        "training": {"learning_rate": 0.02, "epochs": EPOCHS},
    }
    given = {"rounds": ROUNDS, "server_examples": 100, "data": {"name": "digits"}}
    base = out / "base.safetensors"
    if not base.exists():
        out.mkdir(parents=True, exist_ok=True)
        pretrain(make_config({"methods": ["fedavg"], "seeds": [0], **given}, sections), base, share=0.3, epochs=10)
    sections["model"]["pretrained"] = str(base.resolve())
    return make_config({"methods": list(methods), "seeds": list(seeds), **given}, sections)


def alone(config: Any, seed: int) -> tuple[float, float, float]:
    """Mean accuracy, that of the worst client, and that on the test set, of models that clients train by themselves."""
    experiment, local = Experiment(config, seed), config.local_training
    accuracies, weights, tests = [], [], []
    for client in range(experiment.num_clients):
        own, model = experiment.partition.client_data(experiment.dataset, client), experiment.model_fn()
        for round in range(1, ROUNDS + 1):
            train(model, own.train_x, own.train_y, local, seed=seed, client=client, round=round)
        accuracies.append(evaluate(model, own.held_out_x, own.held_out_y)[1])
        weights.append(len(own.held_out_y))
        tests.append(judge(model, experiment.dataset.test).accuracy)
    return float(np.average(accuracies, weights=weights)), min(accuracies), float(np.mean(tests))


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/routed-models")
    config = settings(out)
    runs = out / "runs"
    compare(config, runs, grow=runs.exists(), resume=runs.exists())
    rows = []
    for method in METHODS:
        for seed in SEEDS:
            last = pd.read_json(run_folder(runs, method, seed) / "rounds.jsonl", lines=True).iloc[-1]
            accuracy = last["client_accuracy"], last["client_accuracy_worst"], last["test_accuracy"]
            rows.append((method, seed, *accuracy, last["bytes_down"] / 1e6, last["seconds_merge"]))
    rows += [("local training", seed, *alone(config, seed), 0.0, 0.0) for seed in SEEDS]
    names = ["method", "seed", "mean", "worst client", "all classes", "megabytes down a round", "seconds to merge"]
    table = pd.DataFrame(rows, columns=names)
    table.to_csv(out / "routed-models.csv", index=False)
    print(table.groupby("method", sort=False).agg(["mean", "std"]).drop(columns="seed").round(4).to_string())


if __name__ == "__main__":
    main()
