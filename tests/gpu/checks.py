"""What must come out on a GPU as on the CPU, to a stated tolerance: plain functions, for pytest and for the script.

Each takes the device and returns the largest relative difference from the same on the CPU. Tolerances are for float32
with TF32 off (:mod:`tests.gpu.running` sees to that): some forty times the rounding of the sums involved, and more
where an inverse or a few steps of training carry it on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

import fedmerge
from fedmerge.diagnostics import similarity
from fedmerge.offline.compute import compute_statistics
from fedmerge.permutations import trace
from fedmerge.statistics import statistic as named_statistic
from fedmerge.training import LocalTraining, Participant, choose_engine, train, train_cohort, train_one_by_one
from fedmerge.training.judged import evaluate, judge
from tests.gpu.cases import (
    ARCHITECTURES,
    CLIENTS,
    CPU,
    SETTINGS,
    Federation,
    difference,
    dropout_mlp,
    examples,
    federation,
    moved,
    must_lie,
    seeded,
    state_of,
)

__all__ = ["CHECKS", "Check"]

_STATISTICS = (
    "batch_norm", "batch_norm_sums", "class_counts", "fisher_diag", "fisher_kfac", "gram", "activations",
    "head_sums", "head_gradient", "loss_gradient",
)  # fmt: skip
_MATCHING = ("rebasin", "otfusion", "pfnm", "fedma", "gamf", "c2m3", "cca", "zipit")
_REFINEMENTS = ("recalibrate", "ridge_head", "logistic_head", "natural_gradient", "sequential_refit")
_TIGHT, _USUAL, _LOOSE = 1e-5, 1e-4, 1e-3


@dataclass(frozen=True)
class Check:
    """One thing to compare; `difference` is asked for it on a device and must not exceed `tolerance`."""

    name: str
    difference: Callable[[torch.device], float]
    tolerance: float


def _people(device: torch.device, count: int = CLIENTS) -> list[Participant]:
    sizes = [24, 17, 9, 24, 5][:count]
    return [Participant(i, *moved(examples(i, size), device)) for i, size in enumerate(sizes)]


def training_alone(settings: LocalTraining, architecture: str, device: torch.device, data: str = "resident") -> float:
    """One client, its data on the device or moved batch by batch."""
    found = []
    for where in (device, CPU):
        model = moved(seeded(ARCHITECTURES[architecture]), where)
        x, y = moved(examples(0), where if data == "resident" else CPU)
        report = train(model, x, y, settings, seed=0, client=0, round=1)
        must_lie(state_of(model), where)
        found.append({**state_of(model), "loss": torch.tensor(report.loss)})
    return difference(*found)


def training_many(
    settings: LocalTraining, architecture: str, device: torch.device, stacked: bool = True, data: str = "resident"
) -> float:
    """A cohort of unequal clients, stacked or one after the other."""
    engine, found = train_cohort if stacked else train_one_by_one, []
    for where in (device, CPU):
        model = moved(seeded(ARCHITECTURES[architecture]), where)
        done = engine(model, _people(where if data == "resident" else CPU, 5), settings, seed=0, round=1)
        must_lie(done.states, where)
        found.append({**done.states, "loss": torch.tensor([report.loss for report in done.reports])})
    return difference(*found)


def dropout_of_both_engines(device: torch.device) -> float:
    """Masks of stacked clients are those that each alone would draw on this device."""
    model = moved(seeded(dropout_mlp), device)
    people = _people(device)
    stacked, serial = (f(model, people, SETTINGS, seed=0, round=1).states for f in (train_cohort, train_one_by_one))
    if difference(serial, {name: moved(t, CPU) for name, t in state_times(model, len(people)).items()}) == 0.0:
        raise AssertionError("nothing was trained")
    return difference(stacked, serial)


def state_times(model: torch.nn.Module, count: int) -> dict[str, torch.Tensor]:
    """The model's state, once for each client."""
    return {name: torch.stack([tensor] * count) for name, tensor in state_of(model).items()}


def choosing_an_engine(device: torch.device) -> float:
    """The trial of both engines runs, and finds that they agree."""
    choice = choose_engine(moved(seeded(ARCHITECTURES["cnn"]), device), _people(device), SETTINGS, seed=0, round=1)
    if choice.serial_seconds is None or not choice.serial_seconds > 0:
        raise AssertionError(choice.reason)
    return 0.0


def judging(device: torch.device) -> float:
    """Loss and accuracy, with data on the device and on the CPU."""
    (x, y), model = examples(0), federation("cnn").models[1]
    wanted = judge(moved(model, CPU), x, y)
    found = [judge(moved(model, device), *moved((x, y), where)) for where in (device, CPU)]
    if {one.hits for one in found} != {wanted.hits}:
        raise AssertionError(f"hits {[one.hits for one in found]}, on the CPU {wanted.hits}")
    loss = evaluate(moved(model, device), *moved((x, y), device))[0]
    return max(abs(one - wanted.loss) / wanted.loss for one in (loss, *(one.loss for one in found)))


def measuring(name: str, architecture: str, device: torch.device, data: str = "resident") -> float:
    """A statistic of a trained model."""
    base, found = federation(architecture), []
    for where in (device, CPU):
        model = moved(base.models[0], where)
        batches = moved(base.batches[0], where if data == "resident" else CPU)
        found.append(compute_statistics(model, batches, [named_statistic(name)])[name])
    return difference(*found)


def merging(method: str, architecture: str, device: torch.device, placing: Callable[..., Federation]) -> float:
    """A method through ``fedmerge.merge``, whatever it measures or asks of clients included."""
    wanted = _merged(method, federation(architecture).to(CPU))
    found = _merged(method, placing(federation(architecture), device))
    must_lie(state_of(found), device)
    return difference(state_of(found), state_of(wanted))


def _merged(method: str, people: Federation) -> torch.nn.Module:
    inputs = [batch[0] for batch in people.batches[0]]
    known = {"base": people.base, "data": people.batches[0], "example": inputs[0][:2]}
    return fedmerge.merge(people.models, method, weights=[3, 1, 2], clients=people.batches, **known)


def all_there(people: Federation, device: torch.device) -> Federation:
    """Models and data on the device."""
    return people.to(device)


def data_here(people: Federation, device: torch.device) -> Federation:
    """Models on the device, batches on the CPU, as a DataLoader gives them."""
    return Federation(moved(people.base, device), moved(people.models, device), people.batches)


def scattered(people: Federation, device: torch.device) -> Federation:
    """The first model on the device, the others and the base still on the CPU."""
    return Federation(people.base, [moved(people.models[0], device), *people.models[1:]], people.batches)


def given_statistics(method: str, needs: str, device: torch.device) -> float:
    """Models on the device, statistics read from a file and so on the CPU."""
    people, found = federation("mlp"), []
    values = [compute_statistics(m, b, [needs]) for m, b in zip(moved(people.models, CPU), people.batches, strict=True)]
    for where in (device, CPU):
        done = fedmerge.merge(moved(people.models, where), method, statistics=values, base=moved(people.base, where))
        found.append(state_of(done))
    return difference(*found)


def comparing_features(device: torch.device) -> float:
    """Centred kernel alignment of the clients' features."""
    found = []
    for where in (device, CPU):
        people = federation("mlp").to(where)
        batch = people.batches[0][0][0]
        said = similarity(people.models, [batch], trace(people.models[0], batch[:2]))
        found.append({"cka": said.cka, "correlation": said.correlation.nan_to_num()})
    return difference(*found)


def _training() -> Iterator[Check]:
    adam = LocalTraining(optimizer="adam", learning_rate=0.01, epochs=1, batch_size=8, weight_decay=0.01)
    near = LocalTraining(learning_rate=0.05, steps=7, batch_size=8, proximal_mu=0.1, clip_norm=1.0)
    for name, settings in (("sgd", SETTINGS), ("adam", adam), ("proximal", near)):
        for kind in ARCHITECTURES:
            yield Check(f"train {kind} {name}", partial(training_alone, settings, kind), _LOOSE)
            yield Check(f"train_cohort {kind} {name}", partial(training_many, settings, kind), _LOOSE)
    for kind in ARCHITECTURES:
        serial = partial(training_many, SETTINGS, kind, stacked=False)
        yield Check(f"train_one_by_one {kind}", serial, _LOOSE)
        moving = partial(training_many, SETTINGS, kind, data="moved")
        yield Check(f"train_cohort {kind}, data on the CPU", moving, _LOOSE)
        yield Check(f"train {kind}, data on the CPU", partial(training_alone, SETTINGS, kind, data="moved"), _LOOSE)
    yield Check("dropout of both engines", dropout_of_both_engines, _LOOSE)
    yield Check("choose_engine", choosing_an_engine, 0.0)
    yield Check("judge", judging, _TIGHT)


def _measuring() -> Iterator[Check]:
    for name in _STATISTICS:
        for kind in ARCHITECTURES:
            if not (kind == "mlp" and name.startswith("batch_norm")):
                yield Check(f"statistic {name} {kind}", partial(measuring, name, kind), _USUAL)
        yield Check(f"statistic {name} cnn, data on the CPU", partial(measuring, name, "cnn", data="moved"), _USUAL)
    yield Check("similarity", comparing_features, _USUAL)


def _merging() -> Iterator[Check]:
    for method in fedmerge.methods():
        for kind in ARCHITECTURES:
            for placing in (all_there, data_here):
                what = "" if placing is all_there else ", data on the CPU"
                check = partial(merging, method, kind, placing=placing)
                yield Check(f"merge {method} {kind}{what}", check, _LOOSE)
        check = partial(merging, method, "mlp", placing=scattered)
        yield Check(f"merge {method} mlp, models on two devices", check, _LOOSE)
    for ground in ("rebasin(ground=activations)", "otfusion(ground=activations)"):
        yield Check(f"merge {ground}", partial(_with_options, ground), _LOOSE)
    for method, needs in (("fisher", "fisher_diag"), ("regmean", "gram"), ("fedfisher", "fisher_kfac")):
        check = partial(given_statistics, method, needs)
        yield Check(f"merge {method}, statistics on the CPU", check, _LOOSE)
    for one in _REFINEMENTS:
        for kind in ARCHITECTURES:
            for placing in (all_there, data_here):
                what = "" if placing is all_there else ", data on the CPU"
                check = partial(merging, f"fedavg+{one}", kind, placing=placing)
                yield Check(f"refine {one} {kind}{what}", check, _LOOSE)
    for step in ("server_momentum", "server_adam"):
        yield Check(f"merge fedavg+{step}", partial(merging, f"fedavg+{step}", "cnn", placing=all_there), _LOOSE)


def _with_options(written: str, device: torch.device) -> float:
    method, _, option = written.removesuffix(")").partition("(")
    name, _, value = option.partition("=")
    found = []
    for where in (device, CPU):
        people = federation("cnn").to(where)
        inputs = [batch[0] for batch in people.batches[0]]
        done = fedmerge.merge(people.models, method, data=inputs, example=inputs[0][:2], **{name: value})
        found.append(state_of(done))
    return difference(*found)


CHECKS: tuple[Check, ...] = (*_training(), *_measuring(), *_merging())
