"""How far a merge gets with sums from its clients, beside controls: python simulations/beyond.py [OUT].

Clients with Dirichlet(0.1) labels train from one start for one round; then their models are merged and refined. A row
for every method, with the accuracy and the bytes that a client has sent by then (model included) after each exchange:
fedkfac, its parts, fedkfac within budgets; FedAvg going on for as many bytes; the same new head on the largest
client's model and on the untrained one; and the ensemble of the clients, weighted by who saw which class. Minutes on
scikit-learn's digits; on MNIST and Fashion-MNIST as well where FEDMERGE_DATA names their folder. OUT (runs/beyond)
gets one JSON record a data set, which `python plots/beyond.py` draws.
"""

import copy
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from fedmerge.api import asked_at_hand
from fedmerge.data import PartitionSettings, load_dataset, make_partition
from fedmerge.models import build_model
from fedmerge.models.resize import resize
from fedmerge.pipeline import build_pipeline
from fedmerge.refine.budget import model_bytes
from fedmerge.state import module_state
from fedmerge.statistics import compute_statistics
from fedmerge.statistics.compression import decode, state_bytes
from fedmerge.statistics.settings import compressed
from fedmerge.training.local import LocalTraining, evaluate, train
from fedmerge.update import ClientUpdate, MergeContext

HERE = Path(__file__).parent
SEEDS, ROUNDS = (0, 1, 2), 8
STUDIES = {"digits": ("mlp", 10, 0.1), "mnist": ("lenet", 5, 0.1), "fashion_mnist": ("lenet", 5, 0.1)}
MOST = 2000  # examples a client, so that the study ends
METHODS = (
    "fedavg",
    "fedfisher(damping=0.5)",
    "fedavg+ridge_head",
    "fedavg+logistic_head",
    "fedavg+logistic_head+natural_gradient(count=2)",
    "fedkfac",
    "fedkfac(budget=2.0)",
    "fedkfac(budget=3.0)",
)


class Study:
    """One federation whose clients have trained."""

    def __init__(self, name: str, seed: int) -> None:
        model, clients, alpha = STUDIES[name]
        self.seed, self.data = seed, load_dataset(name)
        parts = make_partition(self.data, PartitionSettings("dirichlet", clients=clients, alpha=alpha), seed)
        self.start = build_model(model, self.data.input_shape, self.data.num_classes, seed=seed)
        own = [parts.client_data(self.data, client) for client in range(clients)]
        self.examples = [(one.train_x[:MOST], one.train_y[:MOST]) for one in own]
        self.loaders = [list(zip(x.split(500), y.split(500), strict=True)) for x, y in self.examples]
        self.models = self.trained(self.start, 1)

    def trained(self, start: nn.Module, round: int) -> list[nn.Module]:
        """The clients' models after a round from `start`."""
        models = [copy.deepcopy(start) for _ in self.examples]
        for client, (model, (x, y)) in enumerate(zip(models, self.examples, strict=True)):
            train(model, x, y, LocalTraining(epochs=5), seed=self.seed, client=client, round=round)
        return models

    def accuracy(self, model: nn.Module) -> float:
        """On the test set."""
        return evaluate(model, self.data.test_x, self.data.test_y)[1]

    def curve(self, method: str, models: list[nn.Module] | None = None) -> list[tuple[float, float]]:
        """Accuracy after each exchange, against what a client has sent by then, in models."""
        models = models or self.models
        pipeline, size = build_pipeline(method), model_bytes(module_state(self.start)[0])
        updates, sent = [], 0
        for client, model in enumerate(models):
            value = compute_statistics(model, self.loaders[client], pipeline.measured)
            form = pipeline.sent_as
            packed, _ = compressed(list(value.items()), dict(model.named_parameters()), form.compression, form.budget)
            sent = max(sent, sum(map(state_bytes, packed.values())))
            statistics = {name: decode(one) for name, one in packed.items()}
            weight = float(len(self.examples[client][0]))
            updates.append(ClientUpdate(client, module_state(model)[0], weight, statistics))
        asked = asked_at_hand(self.start, self.loaders, self.seed, models)
        context = MergeContext(
            base=module_state(self.start)[0],
            seed=self.seed,
            example=self.data.test_x[:2],
            model_fn=lambda: copy.deepcopy(self.start),
            ask=asked,
            own_kept=True,
        )
        result = pipeline.merge(updates, context)
        curve, spent = [], size + sent
        for exchange in result.exchanges:
            spent += exchange.bytes_up
            if exchange.judged:
                curve.append((spent / size, self.accuracy(resize(self.start, exchange.state))))
        return curve or [(spent / size, self.accuracy(resize(self.start, result.state)))]

    def going_on(self) -> list[tuple[float, float]]:
        """FedAvg, round after round."""
        curve, models = [], self.models
        for round in range(1, ROUNDS + 1):
            weights = [float(len(x)) for x, _ in self.examples]
            updates = [ClientUpdate(i, module_state(m)[0], weights[i]) for i, m in enumerate(models)]
            merged = resize(self.start, build_pipeline("fedavg").merge(updates, MergeContext()).state)
            curve.append((float(round), self.accuracy(merged)))
            models = self.trained(merged, round + 1)
        return curve

    def ensemble(self) -> float:
        """Of the clients' probabilities, weighted by each one's share of the examples of a class."""
        counts = torch.stack([y.bincount(minlength=self.data.num_classes) for _, y in self.examples]).double()
        shares = counts / counts.sum(0).clamp_min(1)
        with torch.no_grad():
            total = sum(
                shares[i] * model.eval()(self.data.test_x).softmax(1).double() for i, model in enumerate(self.models)
            )
        return float((torch.as_tensor(total).argmax(1) == self.data.test_y).double().mean())


def rows_of(study: Study) -> dict[str, list[tuple[float, float]]]:
    """Everything that is compared."""
    largest = max(range(len(study.examples)), key=lambda i: len(study.examples[i][0]))
    alone, untrained = ([model] * len(study.models) for model in (study.models[largest], study.start))
    return {
        **{method: study.curve(method) for method in METHODS},
        "FedAvg, further rounds": study.going_on(),
        "largest client + logistic_head": study.curve("fedavg+logistic_head", alone),
        "untrained + logistic_head": study.curve("fedavg+logistic_head", untrained),
        "largest client": [(1.0, study.accuracy(study.models[largest]))],
        "ensemble, class-weighted": [(1.0, study.ensemble())],
    }


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "runs" / "beyond"
    out.mkdir(parents=True, exist_ok=True)
    for name in STUDIES if os.environ.get("FEDMERGE_DATA") else ("digits",):
        rows = []
        for seed in SEEDS:
            for method, curve in rows_of(Study(name, seed)).items():
                print(name, seed, method, [f"{sent:.2f}: {100 * accuracy:.2f}" for sent, accuracy in curve], flush=True)
                rows.append({"seed": seed, "method": method, "curve": curve})
            (out / f"{name}.json").write_text(json.dumps({"data": name, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
