"""How far a merge gets where models were initialised apart: python simulations/trained_apart.py [STUDY ...].

Clients with skewed labels train apart; then their models are merged, beside the ensemble of the very same models and
beside what needs no merge: the largest client's features, or those of an untrained net, under a head that is fitted to
all clients. Perceptrons, convolutions, batch norm, a transformer. Prints a table, mean and standard deviation of test
accuracy over seeds, and leaves the figures in runs/trained-apart. A minute on scikit-learn's digits, half an hour for
all; the others need FEDMERGE_DATA to name their folder.
"""

import json
import os
import statistics
import sys

import torch
from beyond import HERE, SEEDS, Setting, Study

MLP: dict[str, object] = {"hidden": [100, 100]}
BATCH_NORM: dict[str, object] = {"width": 8, "norm": "batch"}
VIT: dict[str, object] = {"dim": 32, "depth": 2, "heads": 4}
STUDIES = {
    "digits, MLP, 5": (Setting("digits", "mlp", 5, 2000, {"hidden": [64, 64]}, apart=True), 0.5),
    "digits, ViT, 3": (Setting("digits", "vit", 3, 2000, VIT, apart=True), 0.5),
    "MNIST, MLP, 10": (Setting("mnist", "mlp", 10, 2000, MLP, apart=True), 0.5),
    "MNIST, LeNet, 5": (Setting("mnist", "lenet", 5, 2000, apart=True), 0.5),
    "MNIST, ResNet-8 with batch norm, 4": (Setting("mnist", "resnet8", 4, 1500, BATCH_NORM, apart=True), 0.3),
    "Fashion-MNIST, MLP, 10": (Setting("fashion_mnist", "mlp", 10, 2000, MLP, apart=True), 0.5),
    "Fashion-MNIST, LeNet, 5": (Setting("fashion_mnist", "lenet", 5, 2000, apart=True), 0.1),
}
METHODS = ("rebasin", "rebasin+recalibrate+logistic_head", "fedkfac(budget=2.0)")
STAGES = ("norms, head", "one step", "two steps", "fedkfac")


def rows_of(study: Study) -> dict[str, float]:
    """Test accuracy of everything that is compared."""
    clients = [study.accuracy(model) for model in study.models]
    alone, untrained = ([model] * len(study.models) for model in (study.largest, study.start))
    head = "fedavg+recalibrate+logistic_head"
    curve = study.curve("fedkfac")
    return {
        "worst client": min(clients),
        "best client": max(clients),
        "ensemble": study.ensemble(weighted=False),
        "ensemble, class-weighted": study.ensemble(),
        "untrained net + logistic head": study.curve(head, untrained)[-1][1],
        "largest client + logistic head": study.curve(head, alone)[-1][1],
        **{method: study.curve(method)[-1][1] for method in METHODS},
        # A step after one that was declined is not taken: the model stays.
        **{stage: curve[min(i, len(curve) - 1)][1] for i, stage in enumerate(STAGES)},
    }


def main() -> None:
    torch.set_num_threads(1)
    out = HERE.parent / "runs" / "trained-apart"
    out.mkdir(parents=True, exist_ok=True)
    chosen = sys.argv[1:] or [name for name in STUDIES if os.environ.get("FEDMERGE_DATA") or name.startswith("digits")]
    results: dict[str, dict[str, list[float]]] = {name: {} for name in chosen}
    for seed in SEEDS:
        for name in chosen:
            setting, alpha = STUDIES[name]
            for method, accuracy in rows_of(Study(setting, seed, alpha)).items():
                print(name, seed, method, f"{100 * accuracy:.2f}", flush=True)
                results[name].setdefault(method, []).append(100 * accuracy)
            (out / f"{name}.json").write_text(json.dumps(results[name], indent=1))
    print("| | " + " | ".join(chosen) + " |\n|" + " --- |" * (1 + len(chosen)))
    for method in results[chosen[0]]:
        cells = [
            f"{statistics.mean(row):.1f} ± {statistics.stdev(row):.1f}" for row in (results[n][method] for n in chosen)
        ]
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
