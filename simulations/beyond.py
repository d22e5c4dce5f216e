"""How far a merge gets with sums from its clients, beside controls: python simulations/beyond.py [STUDY ...].

Clients with Dirichlet(0.1) labels train from one start for one round; then their models are merged and refined. A row
for every method, with the accuracy and the bytes that a client has sent by then (model included) after each exchange:
fedkfac, its parts, fedkfac within budgets; FedAvg going on for as many bytes; the same new head on the largest
client's model and on the untrained one; the ensemble of the clients, weighted by who saw which class; and, on the small
studies, every other method. Minutes on scikit-learn's digits, hours for all; the others need FEDMERGE_DATA to name
their folder. Each study leaves a JSON record in runs/beyond, which `python plots/beyond.py` draws.
"""

import copy
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from fedmerge.data import PartitionSettings, load_dataset, make_partition
from fedmerge.errors import FedMergeError
from fedmerge.merging import build_pipeline
from fedmerge.models import build_model
from fedmerge.models.resize import resize
from fedmerge.offline.merge import asked_at_hand
from fedmerge.refine.budget import model_bytes
from fedmerge.registry import entries
from fedmerge.state import State, module_state
from fedmerge.statistics import Statistic
from fedmerge.statistics.sending.compression import decode, state_bytes
from fedmerge.statistics.sending.settings import compressed
from fedmerge.training import TrainingReport
from fedmerge.training.judged import evaluate
from fedmerge.training.local import LocalTraining, train
from fedmerge.update import ClientUpdate, MergeContext

HERE = Path(__file__).parent
SEEDS, ALPHA = (0, 1, 2), 0.1


@dataclass(frozen=True)
class Setting:
    """A federation: at most so many examples a client, so that the study ends."""

    data: str
    model: str
    clients: int
    examples: int
    options: dict[str, object] = field(default_factory=dict)
    rounds: int = 4
    others: bool = False
    apart: bool = False
    """Every client starts from an initialisation of its own."""


RESNET: dict[str, object] = {"width": 8, "norm": "group"}
STUDIES = {
    "digits-10": Setting("digits", "mlp", 10, 2000, rounds=8, others=True),
    "mnist-5": Setting("mnist", "lenet", 5, 2000, rounds=8, others=True),
    "mnist-20": Setting("mnist", "lenet", 20, 500),
    "fashion_mnist-5": Setting("fashion_mnist", "lenet", 5, 2000, rounds=8),
    "fashion_mnist-20": Setting("fashion_mnist", "lenet", 20, 500),
    "cifar10-5": Setting("cifar10", "lenet", 5, 2000),
    "cifar10-20": Setting("cifar10", "lenet", 20, 500),
    "cifar10-resnet8-5": Setting("cifar10", "resnet8", 5, 1000, RESNET),
    "cifar10-resnet8-20": Setting("cifar10", "resnet8", 20, 250, RESNET),
}
METHODS = ("fedavg", "fedfisher(damping=0.5)", "fedavg+logistic_head", "fedkfac(budget=2.0)", "fedkfac(budget=3.0)")
UNLIMITED = ("fedkfac", "fedavg+ridge_head+natural_gradient(count=3,refresh=false)")
"""With FedAvg for eight rounds beside them, for that is what they send."""


class Study:
    """One federation whose clients have trained."""

    def __init__(self, setting: Setting, seed: int, alpha: float = ALPHA) -> None:
        self.seed, self.data, self.setting = seed, load_dataset(setting.data), setting
        settings = PartitionSettings("dirichlet", clients=setting.clients, alpha=alpha)
        parts = make_partition(self.data, settings, seed)
        shape, classes = self.data.input_shape, self.data.num_classes
        self.start, *own_starts = [
            build_model(setting.model, shape, classes, seed=seed + 1000 * i, **setting.options)
            for i in range(1 + setting.apart * setting.clients)
        ]
        own = [parts.client_data(self.data, client) for client in range(setting.clients)]
        self.examples = [
            (own_data.train_x[: setting.examples], own_data.train_y[: setting.examples]) for own_data in own
        ]
        self.loaders = [list(zip(x.split(500), y.split(500), strict=True)) for x, y in self.examples]
        self.models, self.reports = self.trained(own_starts or [self.start] * setting.clients, 1)
        self.measured: dict[tuple[int, int, Statistic], State] = {}

    def trained(self, starts: Sequence[nn.Module], round: int) -> tuple[list[nn.Module], list[TrainingReport]]:
        """The clients' models after a round from `starts`, and what their training did."""
        models, reports = [copy.deepcopy(start) for start in starts], []
        for client, (model, (x, y)) in enumerate(zip(models, self.examples, strict=True)):
            reports.append(train(model, x, y, LocalTraining(epochs=5), seed=self.seed, client=client, round=round))
        return models, reports

    @property
    def largest(self) -> nn.Module:
        """The model of the client with most examples."""
        return self.models[max(range(len(self.models)), key=lambda i: len(self.examples[i][0]))]

    def statistic(self, kind: Statistic, client: int, model: nn.Module) -> State:
        """Of a trained model, measured once."""
        key = (client, id(model), kind)
        if key not in self.measured:
            self.measured[key] = kind.measure(model, self.loaders[client], self.reports[client])
        return self.measured[key]

    def accuracy(self, model: nn.Module) -> float:
        """On the test set."""
        return evaluate(model, self.data.test_x, self.data.test_y)[1]

    def curve(self, method: str, models: list[nn.Module] | None = None) -> list[tuple[float, float]]:
        """Accuracy after each exchange, against what a client has sent by then, in models."""
        models = models or self.models
        pipeline, size = build_pipeline(method), model_bytes(module_state(self.start)[0])
        updates, sent = [], 0
        for client, model in enumerate(models):
            values = [(kind.name, self.statistic(kind, client, model)) for kind in pipeline.measured]
            form = pipeline.sent_as
            packed, _ = compressed(values, dict(model.named_parameters()), form.compression, form.budget)
            sent = max(sent, sum(map(state_bytes, packed.values())))
            statistics = {name: decode(value) for name, value in packed.items()}
            weight = float(len(self.examples[client][0]))
            updates.append(ClientUpdate(client, module_state(model)[0], weight, statistics))
        asked = asked_at_hand(self.start, self.loaders, self.seed, models)
        context = MergeContext(
            base=None if self.setting.apart else module_state(self.start)[0],
            seed=self.seed,
            example=self.data.test_x[:2],
            model_fn=lambda: copy.deepcopy(self.start),
            ask=asked,
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
        for round in range(1, self.setting.rounds + 1):
            weights = [float(len(x)) for x, _ in self.examples]
            updates = [ClientUpdate(i, module_state(m)[0], weights[i]) for i, m in enumerate(models)]
            merged = resize(self.start, build_pipeline("fedavg").merge(updates, MergeContext()).state)
            curve.append((float(round), self.accuracy(merged)))
            models, _ = self.trained([merged] * len(models), round + 1)
        return curve

    def ensemble(self, *, weighted: bool = True) -> float:
        """Of the clients' probabilities, `weighted` by each one's share of the examples of a class."""
        counts = torch.stack([y.bincount(minlength=self.data.num_classes) for _, y in self.examples]).double()
        shares = counts / counts.sum(0).clamp_min(1) if weighted else torch.ones_like(counts)
        with torch.no_grad():
            total = sum(
                shares[i] * model.eval()(self.data.test_x).softmax(1).double() for i, model in enumerate(self.models)
            )
        return float((torch.as_tensor(total).argmax(1) == self.data.test_y).double().mean())


def rows_of(study: Study) -> dict[str, list[tuple[float, float]]]:
    """Everything that is compared."""
    alone, untrained = ([model] * len(study.models) for model in (study.largest, study.start))
    return {
        **{method: study.curve(method) for method in (*METHODS, *(UNLIMITED if study.setting.rounds >= 8 else ()))},
        "FedAvg, further rounds": study.going_on(),
        "largest client + logistic_head": study.curve("fedavg+logistic_head", alone),
        "untrained + logistic_head": study.curve("fedavg+logistic_head", untrained),
        "largest client": [(1.0, study.accuracy(study.largest))],
        "ensemble, class-weighted": [(1.0, study.ensemble())],
        **(others(study) if study.setting.others else {}),
    }


def others(study: Study) -> dict[str, list[tuple[float, float]]]:
    """Every other method of one exchange, with its defaults."""
    results = {}
    for method in sorted(set(entries("aggregator")) - {"fedavg", "fedkfac"}):
        try:
            results[method] = study.curve(method)
        except FedMergeError as error:
            print(f"{method} is left out: {error}", flush=True)
    return results


def main() -> None:
    torch.set_num_threads(1)
    out = HERE.parent / "runs" / "beyond"
    out.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or (STUDIES if os.environ.get("FEDMERGE_DATA") else ("digits-10",)):
        rows = []
        for seed in SEEDS:
            for method, curve in rows_of(Study(STUDIES[name], seed)).items():
                print(name, seed, method, [f"{sent:.2f}: {100 * accuracy:.2f}" for sent, accuracy in curve], flush=True)
                rows.append({"seed": seed, "method": method, "curve": curve})
            (out / f"{name}.json").write_text(json.dumps({"study": name, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
