"""A base trained on a part of the data, which clients then do not get: what ``fedmerge pretrain`` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedmerge.data.withheld import base_metadata, rows_for_base
from fedmerge.errors import ConfigError, InvalidOption
from fedmerge.models.pretrained import FILE_ENDINGS
from fedmerge.records.atomic_files import write_tensors
from fedmerge.seeding import integer_seed
from fedmerge.simulation.runs.config_model import Config
from fedmerge.simulation.runs.experiment import Experiment
from fedmerge.simulation.runs.fitting import check_fit
from fedmerge.state import is_extra
from fedmerge.training.device import choose_device
from fedmerge.training.judged import judge
from fedmerge.training.local import train

__all__ = ["Base", "pretrain"]

USUAL_SHARE = 0.3
USUAL_EPOCHS = 10


@dataclass(frozen=True)
class Base:
    """What became of a base.

    Parameters
    ----------
    file
        Where it was written.
    examples, of
        How many of the training examples it was trained on, of how many.
    accuracy
        On the whole test set; NaN where the task has none.
    of_classes
        On the test examples of the classes that it was trained on, where some were chosen.
    loss
        On the whole test set.
    """

    file: Path
    examples: int
    of: int
    accuracy: float
    loss: float
    of_classes: float | None = None


def pretrain(
    config: Config,
    out: Path,
    *,
    seed: int = 0,
    share: float | None = None,
    classes: Sequence[int] = (),
    epochs: int | None = None,
) -> Base:
    """Train the configured model on some of the training examples and write it, with which they were.

    The whole model is trained from its initialisation, as ``training`` says, but for early stopping, which is for
    clients that hold examples out. The file's metadata holds the examples' rows: a federation that starts from the file
    gives them to no client.

    Parameters
    ----------
    config
        Data set, model, task and training; what it says of the federation is not used. It names no base itself, and
        nothing frozen, personal or in domains.
    out
        The file, which ends in ``.safetensors``.
    seed
        Of the examples drawn, the initialisation and the batches.
    share
        Of the training examples, or of those of the classes; 0.3, with classes all of these.
    classes
        Labels to train on; all where empty.
    epochs
        Passes over these examples; 10, where the configuration does not count in ``training.steps``.

    Raises
    ------
    InvalidOption
        Share, classes or epochs are out of range.
    ConfigError
        The file's name ends otherwise, or the configuration names what is meant for clients.
    FedMergeError
        Data or model cannot be had, or the file cannot be written.
    """
    if out.suffix != FILE_ENDINGS[0] or out.is_dir():
        raise ConfigError(f"{out}: name a file that ends in {FILE_ENDINGS[0]}")
    model = config.model
    if model.pretrained or model.frozen or model.apart or model.variants or config.personal or config.data.domains:
        raise ConfigError(
            "a base is trained whole and from scratch: leave out model.pretrained, model.frozen, model.apart, "
            "model.variants, personal and data.domains, which are for clients"
        )
    if epochs is not None and epochs < 1:
        raise InvalidOption(f"epochs = {epochs}: must be at least 1")
    experiment = Experiment(config, seed)
    data, task = experiment.dataset, experiment.task
    where = f"model {model.name!r} on data set {data.name!r}"
    check_fit(experiment.model_fn, *data.example, data.outputs, where, task)
    share = (1.0 if classes else USUAL_SHARE) if share is None else share
    rows = rows_for_base(data, share, classes, seed)
    settings = dataclasses.replace(config.training, patience=None, total_rounds=config.training.total_rounds or 1)
    if epochs is not None or settings.steps is None:
        settings = dataclasses.replace(settings, epochs=epochs or USUAL_EPOCHS, steps=None)
    base = experiment.model_fn().to(choose_device(config.device))
    own_seed = integer_seed(seed, "pretraining")  # else its batches are those of client 0
    train(base, data.train.subset(rows), None, settings, seed=own_seed, client=0, round=1, task=task)
    judged = judge(base, data.test, what="the test set", task=task)
    of_classes = None
    if classes:
        labels = torch.cat([targets.cpu() for _, targets in data.test.in_order()])
        seen = torch.isin(labels, torch.tensor(list(classes))).nonzero().flatten()
        of_classes = judge(base, data.test.subset(seen), what="the test set", task=task).accuracy
    told = {
        "model": model.name,
        "model_options": model.options,
        "seed": seed,
        "share": share,
        "classes": list(classes),
        "epochs": settings.epochs,
        "steps": settings.steps,
    }
    state = {name: tensor for name, tensor in base.state_dict().items() if not is_extra(name)}
    write_tensors(out, state, base_metadata(data, rows, told))
    return Base(out, len(rows), len(data.train), judged.accuracy, judged.loss, of_classes)
