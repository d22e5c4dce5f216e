"""One row per method: whoever registers a method adds a row here, and gets every law of this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fedmerge.merging import Pipeline, build_pipeline, main_part
from fedmerge.state import State
from fedmerge.statistics import LocalSteps
from tests.random_statistics import random_diagonal, random_grams, random_kfac

Statistics = Mapping[str, State]


def no_statistics(client: int, state: State) -> Statistics:
    """For methods that need none."""
    return {}


def unequal_steps(client: int, state: State) -> Statistics:
    """Clients that took different numbers of steps."""
    return {"local_steps": LocalSteps().parse({"local_steps": 3 + 2 * client, "momentum": 0.9})}


def rated_steps(client: int, state: State) -> Statistics:
    """The same, with the learning rate."""
    return {"local_steps": LocalSteps().parse({"local_steps": 3 + 2 * client, "learning_rate": 0.1})}


def diagonals(client: int, state: State) -> Statistics:
    """Diagonal Fishers."""
    return {"fisher_diag": random_diagonal(state, client)}


def factors(client: int, state: State) -> Statistics:
    """Kronecker factors of the weights; what has none is averaged."""
    return {"fisher_kfac": random_kfac(state, client)}


def grams(client: int, state: State) -> Statistics:
    """Gram matrices of the inputs."""
    return {"gram": random_grams(state, client)}


def grams_and_counts(client: int, state: State) -> Statistics:
    """Gram matrices, and as many labels of each of three classes as makes clients differ."""
    return {**grams(client, state), **counts(client, state)}


def counts(client: int, state: State) -> Statistics:
    """As many labels of each of three classes as makes clients differ."""
    return {"class_counts": {"class_counts": torch.tensor([client, 5, 2 * client + 1])}}


@dataclass(frozen=True)
class Row:
    """A method with options, what its clients measure, and the laws it is excused from, each with the reason.

    ``remembers`` says whether it keeps memory between rounds, ``traces`` whether it has to know the model, ``hears``
    whether it needs data on the server, ``labels`` whether with labels, ``asks`` whether clients are
    asked about the merged model, ``held`` which parameters clients leave as they were sent
    in the first round, and ``held_next`` in the second.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    statistics: Callable[[int, State], Statistics] = no_statistics
    excused: Mapping[str, str] = field(default_factory=dict)
    remembers: bool = False
    traces: bool = False
    hears: bool = False
    labels: bool = False
    asks: bool = False
    held: tuple[str, ...] = ()
    held_next: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Of the pipeline; repairs measure norms anew, which no law here is about."""
        return {"repair": "none"} if self.traces else {}

    def pipeline(self, **settings: Any) -> Pipeline:
        """The row's pipeline."""
        return build_pipeline(self.method, {main_part(self.method).name: self.options}, **{**self.settings, **settings})

    def known(self, model_fn: Callable[[], nn.Module] | None) -> dict[str, Any]:
        """What the method has to know besides updates: the model, inputs to trace it on, data on the server."""
        inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(7))
        known: dict[str, Any] = {"example": inputs[:2]} if self.traces else {}
        if self.traces and model_fn is not None:
            known["model_fn"] = model_fn
        data = (inputs, torch.arange(40) % 3) if self.labels else inputs
        return known | ({"data": [data]} if self.hears else {})

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.method}({options})"


EXTRAPOLATES = dict.fromkeys(("copies", "one client"), "a step size above 1 goes beyond the clients by design")
ADAPTS = dict.fromkeys(
    ("copies", "one client"), "an adaptive server takes normalised steps, whatever the size of the update"
)
DIFFERENT_STEPS = {"copies": "equal models that took different steps did not move equally per step"}
STEPS_FOR_NORMS = DIFFERENT_STEPS | {"one client": "with momentum the norm exceeds the steps that it is scaled by"}
NOISY = EXTRAPOLATES | {
    "still": "noise is added by design",
    "rows": "noise is drawn for places, which it does not follow",
    "rounding": "noise is drawn in the type of the sum",
}

OWN_ROWS = {"rows": "the Fishers of this table are drawn for places, and do not move with the rows"}
OWN_CLASSES = {"rows": "rows of the output layer are classes, whose counts do not move with them here"}
ONE_MODEL = {
    "rows": "it works on models that can be run, not on tensors of any shape",
    "rounding": "it works on models that can be run, not on tensors of any shape",
}
MIXES = dict.fromkeys(("copies", "still"), "it mixes neurons, even those of equal models")
CLASSES_APART = dict.fromkeys(("ratios",), "the output layer goes by class counts and not by weights")
HALF_STEP = dict.fromkeys(("copies", "one client"), "the merged task vector is scaled down by design")
CLIPPED = {"one client": "an update beyond the bound is shortened by design"}
TRAINED_ALREADY = dict.fromkeys(("modules",), "it is refused where training is over, for it is a way to train")
GOES_ON = dict.fromkeys(
    ("copies", "one client"), "it moves as if the clients that were not asked had moved along, by design"
)
SENT_OUT = {"memory": "what it remembers moves clients in the next round, not the merge"}
UNDONE = dict.fromkeys(("copies", "one client"), "part of each update is undone by design")
DRAWN = UNDONE | {"rows": "which changes stay is drawn for places, and does not move with the rows"}
DRAWN |= {"strategy": "draws are each client's own, and clients of replies made by hand have other numbers"}
HALF_WAY = dict.fromkeys(("copies", "one client"), "it ends half-way between the model sent and theirs, by design")
AVERAGED = {"memory": "the mean over rounds that end alike is how they end"}
OWN_MODELS = {"memory": "what it remembers is clients' own models, which the shared one does not depend on"}
ROUTES = {"memory": "what it remembers makes a routed model of the shared one, from which clients train on"}
SEVERAL_NEED = dict.fromkeys(("copies", "one client"), "what fewer than two clients need above all others is dropped")
EVENED = dict.fromkeys(("copies", "one client"), "every direction of an update gets the same strength, by design")
CUT = {"copies": "of each of K clients a K-th of the directions is kept, by design"}
STEPS_FROM_SUM = {"copies": "it begins at the sum of the updates, and steps of 1e-5 are short"}
WANTS_THREE = dict.fromkeys(
    ("one client", "own memory", "bad updates", "bad first", "rows"),
    "a client is judged by its neighbours, which takes three clients at least",
)
TRIMMED = dict.fromkeys(("copies", "one client"), "what is small in an update is left out, by design")
FROM_THE_START = dict.fromkeys(
    ("copies", "one client"), "it starts at the model sent out and takes what is judged best"
)
SCALES = dict.fromkeys(
    ("copies", "one client"), "it may go further or less far than clients that agree, by what it judges"
)

NEW_HEAD = dict.fromkeys(
    ("copies", "one client", "still"), "its head is fitted to the clients' examples, whatever it was"
)
BY_HAND = dict.fromkeys(
    ("strategy", "grid", "modules"), "clients answer about the merged model, which tests of questions compare by hand"
)
PAIRS = {"pairs": ("0.weight:3.weight",)}
"""The tiny model's two linear layers as one low-rank pair: [6, 4] and [3, 6]."""
HAS_PAIRS = {
    "rows": "it works on low-rank pairs, which tensors of any shape are not",
    "rounding": "it works on low-rank pairs, which tensors of any shape are not",
    "missing statistics": "a client that tells no scaling is taken to have that of the server",
}
HOLDS = TRAINED_ALREADY | {"bad first": "an update without the factor that is held still is a good one"}
NEXT_ROUND = dict.fromkeys(
    ("strategy", "checkpoint"), "in the next round other numbers are held, and updates made by hand are of the first"
)
ONE_A = {name: reason for name, reason in HAS_PAIRS.items() if name != "missing statistics"}
FACTORED_ANEW = dict.fromkeys(
    ("copies", "one client", "still"), "the update is the same, and its factors are others, see tests of pair rules"
)
NOT_MOVED = {"grid": "without a search it stays where it is, which is no round worth the name"}
SENT_ON = {"memory": "what it remembers are models to search among, and this row does not search"}

ROWS = (
    Row("fedavg"),
    Row("fedprox", excused=TRAINED_ALREADY),
    Row("scaffold", {"population": 4}, rated_steps, TRAINED_ALREADY | SENT_OUT, remembers=True),
    Row("scaffold", {"population": 4, "weighted": True}, rated_steps, TRAINED_ALREADY | SENT_OUT, remembers=True),
    Row("feddyn", {"population": 4}, excused=TRAINED_ALREADY | GOES_ON, remembers=True),
    Row("lookaround", excused=TRAINED_ALREADY),
    Row("fednova", statistics=unequal_steps, excused=DIFFERENT_STEPS),
    Row("fednova", {"server_momentum": 0.9}, unequal_steps, DIFFERENT_STEPS, remembers=True),
    Row("fednova", {"tau_eff": "mean_steps"}, unequal_steps, STEPS_FOR_NORMS),
    Row("fedatt", excused=EXTRAPOLATES),
    Row("fedatt", {"step_size": 1.0}),
    Row("fedatt", {"step_size": 1.0, "norm": "frobenius"}),
    Row("fedatt", {"noise": 0.01}, excused=NOISY),
    Row("fisher", statistics=diagonals, excused=OWN_ROWS),
    Row("fisher", {"damping": 0.1, "normalize": 1.0}, diagonals, OWN_ROWS),
    Row("fisher_nodes", statistics=factors, excused=OWN_ROWS),
    Row("fisher_nodes", {"universal": False}, factors, OWN_ROWS),
    Row("fedfisher", {"variant": "diag"}, diagonals, OWN_ROWS),
    Row("fedfisher", {"variant": "kfac"}, factors, OWN_ROWS),
    Row("fedfisher", {"variant": "kfac", "damping": 0.0, "normalize": 0.0}, factors, OWN_ROWS),
    Row("regmean", statistics=grams),
    Row("regmean", {"shrinkage": 1.0, "ridge": 0.0, "ridge_convolution": 0.0, "normalize": "none"}, grams),
    Row("fedlpa", statistics=factors, excused=OWN_ROWS),
    Row("maecho", statistics=grams_and_counts, excused=OWN_CLASSES),
    Row("maecho", {"class_aware": False, "steps": 10}, grams),
    Row("mats", statistics=factors, excused=OWN_ROWS),
    Row("mats", {"curvature": "gram", "steps": 10}, grams),
    Row("gradient_matching", statistics=diagonals, excused=OWN_ROWS, remembers=True),
    Row("gradient_matching", {"scale": 0.5, "delta": 0.1}, diagonals, OWN_ROWS | HALF_STEP, remembers=True),
    Row("median"),
    Row("trimmed_mean"),
    Row("trimmed_mean", {"trim": 0.4}),
    Row("geometric_median"),
    Row("krum", excused=WANTS_THREE),
    Row("krum", {"attackers": 0.0, "selected": 2}, excused=WANTS_THREE),
    Row("krum", {"attackers": 1, "selected": 2, "form": "flower"}),
    Row("norm_clipping", {"bound": 1000.0}),
    Row("norm_clipping", excused=CLIPPED),
    Row("median_norm_clipping"),
    Row("task_arithmetic"),
    Row("task_arithmetic", {"scale": 0.3, "form": "sum"}, excused=HALF_STEP),
    Row("metagpt"),
    Row("fedgma"),
    Row("fedgma", {"threshold": 1.0}),
    Row("magmax", excused=HALF_STEP),
    Row("magmax", {"scale": 1.0}),
    Row("ties", excused=TRIMMED),
    Row("ties", {"density": 1.0}),
    Row("ties", {"density": 1.0, "elect": "unweighted", "disjoint": "mean_by_count", "undecided": "positive"}),
    Row("ties", {"scope": "tensor", "disjoint": "sum", "scale": 0.3}, excused=TRIMMED),
    Row("model_stock"),
    Row("model_stock", {"scope": "row"}),
    Row("slerp"),
    Row("slerp", {"of": "updates", "scope": "model"}),
    Row("multislerp"),
    Row("multislerp", {"of": "updates"}),
    Row("karcher"),
    Row("karcher", {"of": "updates", "scope": "model"}),
    Row("soup"),
    Row("consensus", excused=SEVERAL_NEED),
    Row("consensus", {"threshold": 0.0, "agreeing": 1}),
    Row("tall_masks", excused=OWN_MODELS, remembers=True),
    Row("emr", excused=OWN_MODELS, remembers=True),
    Row("wemoe", {"steps": 2}, excused=ONE_MODEL | ROUTES, traces=True, hears=True, remembers=True),
    Row("twin_merging", excused=ROUTES, remembers=True),
    Row("twin_merging", {"steps": 2}, excused=ONE_MODEL | ROUTES, traces=True, hears=True, labels=True, remembers=True),
    Row("smear", {"steps": 2}, excused=ONE_MODEL | ROUTES, traces=True, hears=True, remembers=True),
    Row("pwe_moe", {"steps": 2}, excused=ONE_MODEL | ROUTES, traces=True, hears=True, labels=True, remembers=True),
    Row("iso_c", excused=EVENED),
    Row("tsv_m", excused=CUT),
    Row("tsv_m", {"kept": 1.0}),
    Row("wudi"),
    Row("concrete", {"evaluations": 0}),
    Row("concrete", {"evaluations": 2}, excused=ONE_MODEL | SCALES, traces=True, hears=True),
    Row("wudi", {"solver": "adam", "steps": 20}, excused=STEPS_FROM_SUM),
    Row("rebasin", excused=ONE_MODEL, traces=True),
    Row("rebasin", {"combine": "median"}, excused=ONE_MODEL, traces=True),
    Row("otfusion", {"combine": "trimmed_mean(trim=0.4)"}, excused=ONE_MODEL, traces=True),
    Row("rebasin", {"ground": "activations"}, excused=ONE_MODEL, traces=True, hears=True),
    Row("otfusion", excused=ONE_MODEL, traces=True),
    Row("clafusion", excused=ONE_MODEL, traces=True),
    Row(
        "otfusion",
        {"solver": "sinkhorn", "importance": "l1", "regularization": 0.1},
        excused=ONE_MODEL | MIXES,
        traces=True,
    ),
    Row("otfusion", {"fusion": "barycentre"}, excused=ONE_MODEL, traces=True),
    Row("gamf", excused=ONE_MODEL, traces=True),
    Row("fedkfac", {"head": "none", "steps": 0}, factors, OWN_ROWS | ONE_MODEL, traces=True),
    Row("glmc", excused=ONE_MODEL, traces=True),
    Row("c2m3", excused=ONE_MODEL, traces=True),
    Row("zipit", excused=ONE_MODEL | MIXES, traces=True, hears=True),
    Row("cca", excused=ONE_MODEL | MIXES, traces=True, hears=True),
    Row("mudsc", excused=ONE_MODEL, traces=True, hears=True),
    Row("mudsc", {"balance": 1.0}, excused=ONE_MODEL, traces=True, hears=True),
    Row("sinkhorn_rebasin", {"steps": 10}, excused=ONE_MODEL, traces=True),
    Row("ste_rebasin", {"steps": 3}, excused=ONE_MODEL, traces=True, hears=True, labels=True),
    Row("neuron_alignment", excused=ONE_MODEL, traces=True, hears=True),
    Row("neuron_alignment", {"cost": "distance"}, excused=ONE_MODEL, traces=True, hears=True),
    Row("pfnm", {"gamma": 1e-3}, counts, ONE_MODEL | CLASSES_APART, traces=True),
    Row("pfnm", {"class_aware": False, "gamma": 1e-3}, excused=ONE_MODEL, traces=True),
    Row("fedma", {"class_aware": False, "gamma": 1e-3, "retrain_epochs": 0}, excused=ONE_MODEL, traces=True),
    Row("trim+fedavg", excused=UNDONE),
    Row("trim(density=0.5,scope=tensor)+median", excused=UNDONE),
    Row("dare+fedavg", excused=DRAWN),
    Row("della(rescale=l1)+fedavg", excused=DRAWN),
    Row("breadcrumbs(density=0.8)+fedavg", excused=UNDONE),
    Row("clip+fedavg", remembers=True),
    Row("clip(radius=0.1,centre=zero)+fedavg", excused=UNDONE),
    Row("lines+fednova", {}, unequal_steps, DIFFERENT_STEPS | UNDONE),
    Row("linearised+fedavg"),
    Row("linearised(parameters=['*'])+task_arithmetic", {"scale": 0.3, "form": "sum"}, excused=HALF_STEP),
    Row("adamerging", {"evaluations": 0}),
    Row("adamerging", {"evaluations": 2}, excused=ONE_MODEL | SCALES, traces=True, hears=True),
    Row("atlas", {"evaluations": 0}, excused=FROM_THE_START | NOT_MOVED),
    Row("atlas", {"evaluations": 2}, excused=ONE_MODEL | FROM_THE_START, traces=True, hears=True, labels=True),
    Row("mehl_soup", {"evaluations": 0}),
    Row("mehl_soup", {"evaluations": 2}, excused=ONE_MODEL, traces=True, hears=True, labels=True),
    Row("evolutionary", {"evaluations": 0}),
    Row("evolutionary", {"evaluations": 7}, excused=ONE_MODEL, traces=True, hears=True, labels=True),
    Row("lorahub", {"evaluations": 0}, excused=FROM_THE_START | NOT_MOVED),
    Row("lorahub", {"evaluations": 6}, excused=ONE_MODEL | FROM_THE_START, traces=True, hears=True, labels=True),
    Row("checkpoint_search", {"evaluations": 0, "checkpoints": 3}, excused=SENT_ON, remembers=True),
    Row(
        "checkpoint_search",
        {"between": "clients", "sampler": "tpe", "evaluations": 3},
        excused=ONE_MODEL,
        traces=True,
        hears=True,
        labels=True,
    ),
    Row("afl", excused=ONE_MODEL | NEW_HEAD | BY_HAND, traces=True, asks=True),
    Row("gaussian_heads", excused=ONE_MODEL | NEW_HEAD | BY_HAND, traces=True, asks=True),
    Row("regmean_plusplus", excused=ONE_MODEL | BY_HAND, traces=True, asks=True),
    Row("fedit", PAIRS, excused=HAS_PAIRS),
    Row("flexlora", PAIRS, excused=HAS_PAIRS | FACTORED_ANEW),
    Row("core_space", PAIRS, excused=HAS_PAIRS | FACTORED_ANEW),
    Row("core_space", {**PAIRS, "combine": "ties(density=1)"}, excused=HAS_PAIRS | FACTORED_ANEW),
    Row("ffa_lora", PAIRS, excused=HAS_PAIRS | HOLDS, held=("0.weight",)),
    Row("rolora", PAIRS, excused=HAS_PAIRS | HOLDS | NEXT_ROUND, held=("0.weight",), held_next=("3.weight",)),
    Row("fedsvd", PAIRS, excused=HAS_PAIRS | HOLDS | FACTORED_ANEW | NEXT_ROUND, held=("0.weight",)),
    Row("fedsa_lora", {"pairs": ("0.weight:none.weight",)}, excused=ONE_A),
    Row("hetlora", PAIRS, excused=HAS_PAIRS),
    Row("hetlora", {**PAIRS, "weigh": "both"}, excused=HAS_PAIRS),
    Row("raflora", PAIRS, excused=HAS_PAIRS),
    Row("fedrot_lora", PAIRS, excused=HAS_PAIRS | FACTORED_ANEW),
    Row("lora_fair", {**PAIRS, "regularization": 0.0}, excused=HAS_PAIRS),
    Row("fedavg+surgery", excused=ONE_MODEL | BY_HAND, traces=True, asks=True),
    Row("fedavg+server_momentum", remembers=True),
    Row("fedavg+server_adam", excused=ADAPTS, remembers=True),
    Row("fedavg+server_adam(form=flower)", excused=ADAPTS, remembers=True),
    Row("fedavg+server_yogi", excused=ADAPTS, remembers=True),
    # At tau = 1e-3 a first step is up to 100 times the update, and so are its last bits.
    Row("fedavg+server_adagrad(tau=0.1)", excused=ADAPTS, remembers=True),
    Row("fedavg+swa", excused=AVERAGED, remembers=True),
    Row("median+ema(rate=0.5)", excused=AVERAGED, remembers=True),
    Row("fedavg+lawa(latest=2)", excused=AVERAGED, remembers=True),
    Row(
        "fedavg+wise_ft",
        excused=HALF_WAY | {"rounding": "the model between two rounded ones is rounded again"},
        remembers=True,
    ),
    Row("fednova+server_momentum", {"server_momentum": 0.5}, unequal_steps, DIFFERENT_STEPS, remembers=True),
)
