"""What noise on the sums of a head costs in accuracy: python simulations/private_head.py [OUT].

Ten clients with Dirichlet(0.1) labels train from one start, one round; the mean of their models gets a new head from
sums with clipped features and Gaussian noise. Minutes on scikit-learn's digits; on MNIST as well, the ridge head only,
where FEDMERGE_DATA names its folder. OUT (runs/private-head) gets one JSON record a data set, which
`python plots/private_head.py` draws.
"""

import copy
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from fedmerge.data import PartitionSettings, load_dataset, make_partition
from fedmerge.merging import build_pipeline
from fedmerge.models import build_model
from fedmerge.models.resize import resize
from fedmerge.offline.merge import asked_at_hand
from fedmerge.refine import Privacy, epsilon
from fedmerge.seeding import integer_seed
from fedmerge.state import module_state
from fedmerge.statistics import NoisySums
from fedmerge.training.judged import evaluate
from fedmerge.training.local import LocalTraining, train
from fedmerge.update import ClientUpdate, MergeContext

HERE = Path(__file__).parent
CLIENTS, SEEDS, DELTA = 10, (0, 1, 2), 1e-5
MULTIPLIERS = {"digits": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0), "mnist": (1.0, 4.0, 16.0, 64.0)}
MODELS = {"digits": "mlp", "mnist": "lenet"}
HEADS = {"digits": ("ridge_head", "logistic_head"), "mnist": ("ridge_head",)}
CLIP = 5.0  # below most features' norms, so that all count the same; chosen once, and not by accuracy


def federation(name: str, seed: int):
    """The data, clients' loaders and trained models, and what the merge is told."""
    data = load_dataset(name)
    parts = make_partition(data, PartitionSettings("dirichlet", clients=CLIENTS, alpha=0.1), seed)
    start = build_model(MODELS[name], data.input_shape, data.num_classes, seed=seed)
    loaders, updates = [], []
    for client in range(CLIENTS):
        own = parts.client_data(data, client)
        model = copy.deepcopy(start)
        train(model, own.train_x, own.train_y, LocalTraining(epochs=5), seed=seed, client=client, round=1)
        loaders.append(list(zip(own.train_x.split(500), own.train_y.split(500), strict=True)))
        updates.append(ClientUpdate(client, module_state(model)[0], float(len(own.train_x))))
    return data, start, loaders, updates


def run(name: str, out: Path) -> None:
    """A row for each seed, method and noise."""
    rows: list[dict[str, object]] = []
    for seed in SEEDS:
        data, model, loaders, updates = federation(name, seed)
        for number, (method, setting, privacy) in enumerate(settings(name)):
            ask = asked_at_hand(model, loaders, integer_seed(seed, "study", number))
            result = build_pipeline(method, privacy=privacy).merge(updates, MergeContext(seed=seed, ask=ask))
            row = {"seed": seed, "method": method, "setting": setting, "answers": result.answers}
            row["accuracy"] = evaluate(resize(model, result.state), data.test_x, data.test_y)[1]
            if privacy.noise is not None:
                row["noise_multiplier"] = privacy.noise.noise_multiplier
                row["epsilon"] = epsilon(privacy.noise.noise_multiplier, result.answers, DELTA)
            print(name, json.dumps(row), flush=True)
            rows.append(row)
        record = {"data": name, "clients": CLIENTS, "delta": DELTA, "clip": CLIP, "rows": rows}
        (out / f"{name}.json").write_text(json.dumps(record, indent=1))


def settings(name: str) -> Iterator[tuple[str, str, Privacy]]:
    """The controls, and every noise."""
    yield "fedavg", "plain", Privacy()
    for method in (f"fedavg+{head}" for head in HEADS[name]):
        yield method, "plain", Privacy()
        yield method, "masks", Privacy(masks=True)
        for sigma in MULTIPLIERS[name]:
            yield method, "own", Privacy(noise=NoisySums(CLIP, sigma))
            yield method, "shared", Privacy(masks=True, noise=NoisySums(CLIP, sigma, sharers=CLIENTS))


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "runs" / "private-head"
    out.mkdir(parents=True, exist_ok=True)
    for name in ("digits", "mnist") if os.environ.get("FEDMERGE_DATA") else ("digits",):
        run(name, out)


if __name__ == "__main__":
    main()
