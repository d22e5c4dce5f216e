"""``fedmerge pretrain``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from fedmerge.commands.options import (
    DataDir,
    DataSet,
    NoCode,
    OptionalConfig,
    Set,
    given,
    own_parts,
    read_config,
    tell_code,
)
from fedmerge.errors import RecordError

__all__ = ["pretrain"]


def pretrain(
    out: Annotated[Path, typer.Option(metavar="BASE.safetensors", help="The file to write.")],
    config: OptionalConfig = None,
    dataset: DataSet = None,
    model: Annotated[str | None, typer.Option(help="mlp, lenet, resnet8, ... or module:factory.")] = None,
    share: Annotated[
        float | None, typer.Option(help="Of the training examples: 0.3 by default, with --classes all of theirs.")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Only examples of these classes: 0,1,2,3,4.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the examples: 10 by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of examples, initialisation and batches.")] = 0,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    data_dir: DataDir = None,
    assignments: Set = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    no_code: NoCode = False,
) -> None:
    """Train a base on a part of the data, for a federation to start from.

    The file says which examples it was trained on: where model.pretrained names it, no client gets them. Of a
    configuration its data set, model, task and training count; what it says of the base itself, of frozen and personal
    parts and of domains is left to the federation.
    """
    from fedmerge.offline.merge_files import numbers
    from fedmerge.simulation.runs.base_training import pretrain as train_base

    if out.exists() and not overwrite:
        raise RecordError(f"{out} exists: choose another --out, or pass --overwrite")
    flags = {
        "data": given(name=dataset, dir=data_dir),
        "model": given(name=model),
        "device": device,
    }
    settings = read_config(config, given(**flags), assignments, without=FOR_CLIENTS)
    where, code = "the command line" if config is None else str(config), own_parts(settings)
    tell_code(where, [settings.model.name], refused=no_code, task=settings.task.code, **code)
    labels = numbers(classes, "--classes", int) or ()
    base = train_base(settings, out, seed=seed, share=share, classes=labels, epochs=epochs)
    score = f"loss {base.loss:.4g}" if math.isnan(base.accuracy) else f"accuracy {100 * base.accuracy:.2f} %"
    known = "" if base.of_classes is None else f", on classes {classes} {100 * base.of_classes:.2f} %"
    typer.echo(
        f"{base.file}: trained on {base.examples} of {base.of} training examples, test {score}{known}. "
        f"Clients that start from it do not get these: --pretrained {base.file}"
    )


FOR_CLIENTS = (
    "model.pretrained",
    "model.pretrained_except",
    "model.pretrained_digest",
    "model.prefix",
    "model.frozen",
    "model.apart",
    "model.variants",
    "personal",
    "training.personal_epochs",
    "data.domains",
)
"""What a configuration says of clients alone."""
