"""What a client costs that lies when asked about the merged model: python -m simulations.lying_answers [OUT].

Clients with Dirichlet parts train a small MLP from one start and `fedkfac` merges once: with all of them honest,
without the liar, and with the liar's answers changed in every exchange. OUT (runs/lying-answers) gets
``lying_answers.csv`` with every accuracy, as they come; printed is a table of points of accuracy against leaving the
liar out, means over seeds and the worst. The liar is the client of middle size. A merge takes one to three seconds.

    python -m simulations.lying_answers OUT --settings digits/6/0.1 digits/10/0.5 --seeds 0 1 --lies "sums negated"

A setting is data set / clients / alpha.
"""

from __future__ import annotations

import argparse
import csv
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fedmerge
from fedmerge.data import PartitionSettings, load_dataset, make_partition
from fedmerge.merging import build_pipeline
from fedmerge.models import build_model
from fedmerge.models.resize import resize
from fedmerge.questions import Answer, Question, respond
from fedmerge.refine import Trust
from fedmerge.state import module_state
from fedmerge.statistics.sending.compression import decode
from fedmerge.training import LocalTraining, train
from fedmerge.training.judged import judge
from fedmerge.update import ClientUpdate, MergeContext

SETTINGS = ("digits/6/0.1", "digits/6/0.5", "digits/5/0.1", "digits/10/0.1")
EXAMPLES, HIDDEN, MARGIN = 3000, [32, 32], 5.0
TRAINING = LocalTraining(epochs=10, learning_rate=0.1, batch_size=16)
SQUARE = ("S", "A", "G", "curvature")
"""Second moments, which are positive whatever happens: a liar that negates them is found out."""

Lie = Callable[[Answer], Answer]


def sums(answer: Answer, change: Callable[[Tensor], Tensor], squares: bool = False) -> Answer:
    """An answer whose means are changed, and where told whose second moments are too."""
    statistics = {
        kind: {n: change(t) if squares or n.rpartition(".")[2] not in SQUARE else t for n, t in value.items()}
        for kind, value in answer.statistics.items()
    }
    return replace(answer, statistics=statistics)


def best(answer: Answer, point: int) -> Answer:
    """An answer by which one point is best and all others are worthless."""
    if not len(answer.losses):
        return answer
    losses = torch.full_like(answer.losses, 1e6 * max(1, answer.judged))
    losses[point] = 0
    return replace(answer, losses=losses)


def reverse(answer: Answer) -> Answer:
    """An answer by which the worst point is best."""
    return replace(answer, losses=answer.losses.max() - answer.losses) if len(answer.losses) else answer


def roll(tensor: Tensor) -> Tensor:
    """Each class in the place of the next."""
    return tensor.roll(1, 0) if tensor.shape[:1] == (10,) else tensor


def noise(tensor: Tensor) -> Tensor:
    """Noise as loud as what it stands for."""
    drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loud: Tensor = drawn * (tensor.double().norm() / drawn.norm().clamp_min(1e-12))
    return loud.to(tensor.dtype)


LIES: dict[str, Lie] = {
    "losses are NaN": lambda a: replace(a, losses=a.losses * torch.nan),
    "the present model is best": lambda a: best(a, 0),
    "the last model is best": lambda a: best(a, -1),
    "the worst model is best": reverse,
    "sums times 3": lambda a: sums(a, lambda t: 3 * t, squares=True),
    "sums times a million": lambda a: sums(a, lambda t: 1e6 * t, squares=True),
    "sums are zero": lambda a: sums(a, torch.zeros_like, squares=True),
    "sums negated": lambda a: sums(a, torch.neg),
    "sums negated, the worst model is best": lambda a: reverse(sums(a, torch.neg)),
    "sums negated and doubled, the worst model is best": lambda a: reverse(sums(a, lambda t: -2 * t)),
    "classes swapped, the worst model is best": lambda a: reverse(sums(a, roll)),
    "noise, the worst model is best": lambda a: reverse(sums(a, noise)),
}


@dataclass(frozen=True)
class Problem:
    """A data set in parts, and clients' models that have been trained on them."""

    dataset: str
    clients: int
    alpha: float
    seed: int

    @cached_property
    def data(self) -> Any:
        """In memory."""
        return load_dataset(self.dataset)

    def model(self) -> nn.Module:
        """The start of all clients."""
        return build_model("mlp", self.data.input_shape, self.data.num_classes, seed=self.seed, hidden=HIDDEN)

    @cached_property
    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """Examples of each client, of no more than 3,000 in all."""
        most = EXAMPLES // self.clients
        settings = PartitionSettings("dirichlet", clients=self.clients, alpha=self.alpha, max_examples=most)
        divided = make_partition(self.data, settings, self.seed)
        clients = [divided.client_data(self.data, client) for client in range(self.clients)]
        return [(own_data.train_x, own_data.train_y) for own_data in clients]

    @cached_property
    def trained(self) -> list[nn.Module]:
        """Each client's model."""
        models = []
        for client, (x, y) in enumerate(self.parts):
            models.append(self.model())
            train(models[-1], x, y, TRAINING, seed=self.seed, client=client, round=1)
        return models

    @property
    def liar(self) -> int:
        """The client of middle size."""
        return sorted(range(self.clients), key=lambda client: len(self.parts[client][0]))[self.clients // 2]

    def merged(self, trust: Trust, lie: Lie | None = None, without: int | None = None) -> float:
        """Accuracy of the merged model, in percent."""
        pipeline, updates = build_pipeline("fedkfac", trust=trust), []
        for client in (client for client in range(self.clients) if client != without):
            model, part = self.trained[client], self.parts[client]
            values = fedmerge.compute_statistics(model, [part], list(pipeline.measured))
            updates.append(ClientUpdate(client, module_state(model)[0], float(len(part[0])), values))

        def ask(questions: Sequence[Question], clients: Sequence[int]) -> list[tuple[int, list[Answer]]]:
            return [(client, [self.answered(q, client, lie) for q in questions]) for client in clients]

        start, shown = module_state(self.model())[0], self.parts[0][0][:2]
        state = pipeline.merge(updates, MergeContext(base=start, model_fn=self.model, example=shown, ask=ask)).state
        module, test = resize(self.model(), state).eval(), (self.data.test_x, self.data.test_y)
        return 100 * judge(module, *test, what=self.dataset).accuracy

    def answered(self, question: Question, client: int, lie: Lie | None) -> Answer:
        """What a client says, or the liar in its place."""
        model = self.trained[client]
        answer = respond(question, model, [self.parts[client]], own=model)
        if lie is None or client != self.liar:
            return answer
        return lie(replace(answer, statistics={kind: decode(value) for kind, value in answer.statistics.items()}))


def rows(setting: str, seed: int, lies: Sequence[str], trust: Trust) -> list[dict[str, Any]]:
    """A row for each lie, with what the method is without liars, and its seconds of CPU."""
    dataset, clients, alpha = setting.split("/")
    problem = Problem(dataset, int(clients), float(alpha), seed)
    left = problem.merged(trust, without=problem.liar)
    began = time.process_time()
    honest = problem.merged(trust)
    facts = {"setting": setting, "seed": seed, "honest": honest, "left out": left}
    facts["seconds"] = round(time.process_time() - began, 2)
    models = [(lie, problem.merged(trust, LIES[lie])) for lie in lies]
    return [{**facts, "lie": lie, "accuracy": value, "difference": value - left} for lie, value in models]


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line for each lie, and in each setting the mean difference and the worst."""
    settings, lies = (list(dict.fromkeys(row[key] for row in results)) for key in ("setting", "lie"))
    lines = [f"| lie in every answer | {' | '.join(settings)} |", "| --- |" + " --- |" * len(settings)]
    for name in ("honest", "left out"):
        seen = [
            {row["seed"]: row[name] for row in results if row["setting"] == setting}.values() for setting in settings
        ]
        lines.append(f"| {name} | {' | '.join(f'{sum(v) / len(v):.1f}' for v in seen)} |")
    for lie in lies:
        costs = [[row["difference"] for row in results if (row["setting"], row["lie"]) == (s, lie)] for s in settings]
        cells = [f"{sum(c) / len(c):+.1f} ({min(c):+.1f})" if c else "" for c in costs]
        lines.append(f"| {lie} | {' | '.join(cells)} |")
    beyond = [row for row in results if row["difference"] < -MARGIN]
    lines += ["", f"Beyond {MARGIN:.0f} points: {len(beyond)} of {len(results)}"]
    lines += [f"- {r['setting']}, seed {r['seed']}, {r['lie']}: {r['difference']:+.1f}" for r in beyond]
    return "\n".join(lines)


def main() -> None:
    """Run, and write as results come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/lying-answers"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), metavar="DATA/CLIENTS/ALPHA")
    parser.add_argument("--lies", nargs="+", default=list(LIES), choices=list(LIES), metavar="LIE")
    parser.add_argument("--sums", default=Trust().sums, choices=("mean", "clipped"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("fedmerge").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    for setting in arguments.settings:
        for seed in arguments.seeds:
            results += rows(setting, seed, arguments.lies, Trust(sums=arguments.sums))
            with (arguments.out / "lying_answers.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(results[0]))
                writer.writeheader()
                writer.writerows(results)
            worst = min(row["difference"] for row in results[-len(arguments.lies) :])
            print(f"{setting}, seed {seed}: worst {worst:+.1f}")
    print(table(results))


if __name__ == "__main__":
    main()
