"""Clients' own models, from masks and from local training: python -m simulations.personal_masks [OUT].

Twenty clients with Dirichlet(0.1) parts of scikit-learn's digits, eight rounds of two epochs, five seeds. Accuracy on
the clients' held-out examples, mean and worst tenth, of: local training of as many epochs and nothing else; FedAvg's
shared model; and the models that ``emr`` and ``tall_masks`` make of one shared model, a mask of one bit a parameter and
one number for each client. OUT (runs/personal-masks) gets the records and ``personal-masks.csv``. A minute.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from fedmerge.data import PartitionSettings, load_dataset, make_partition
from fedmerge.models import build_model
from fedmerge.simulation import compare, make_config
from fedmerge.simulation.runs.unfinished import run_folder
from fedmerge.training import LocalTraining
from fedmerge.training.judged import evaluate
from fedmerge.training.local import train

CLIENTS, ALPHA, ROUNDS, EPOCHS, SEEDS = 20, 0.1, 8, 2, (0, 1, 2, 3, 4)
METHODS = ("fedavg", "emr", "tall_masks")
MODEL = {"hidden": [64]}
TRAINING = {"learning_rate": 0.05, "epochs": EPOCHS}
PARTITION = {"scheme": "dirichlet", "clients": CLIENTS, "alpha": ALPHA, "held_out": 0.3}


def alone(seed: int) -> tuple[float, float]:
    """Mean accuracy, by held-out examples, and that of the worst tenth, of models that clients train by themselves."""
    data = load_dataset("digits")
    parts = make_partition(data, PartitionSettings(**PARTITION), seed)
    settings = LocalTraining(learning_rate=TRAINING["learning_rate"], epochs=EPOCHS * ROUNDS)
    accuracies, weights = [], []
    for client in range(CLIENTS):
        own = parts.client_data(data, client)
        if not len(own.held_out_y):
            continue
        model = build_model("mlp", data.input_shape, data.num_classes, seed=seed, **MODEL)
        train(model, own.train_x, own.train_y, settings, seed=seed, client=client, round=1)
        accuracies.append(evaluate(model, own.held_out_x, own.held_out_y)[1])
        weights.append(len(own.held_out_y))
    worst = sorted(accuracies)[: max(1, len(accuracies) // 10)]
    return float(np.average(accuracies, weights=weights)), float(np.mean(worst))


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/personal-masks")
    config = make_config(
        {"methods": list(METHODS), "seeds": list(SEEDS), "rounds": ROUNDS, "data": {"name": "digits"}},
        {"partition": PARTITION, "model": {"name": "mlp", "options": MODEL}, "training": TRAINING},
    )
    compare(config, out, grow=out.exists(), resume=out.exists())
    rows = []
    for method in METHODS:
        for seed in SEEDS:
            last = pd.read_json(run_folder(out, method, seed) / "rounds.jsonl", lines=True).iloc[-1]
            rows.append(
                (method, seed, last["client_accuracy"], last["client_accuracy_worst"], last["bytes_down"] / 1e6)
            )
    for seed in SEEDS:
        rows.append(("local training", seed, *alone(seed), 0.0))
    table = pd.DataFrame(rows, columns=["method", "seed", "mean", "worst tenth", "megabytes down a round"])
    table.to_csv(out / "personal-masks.csv", index=False)
    print(table.groupby("method").agg(["mean", "std"]).drop(columns="seed").round(4).to_string())


if __name__ == "__main__":
    main()
