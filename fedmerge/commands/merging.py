"""``fedmerge merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedmerge.commands.options import NoCode, tell_code

__all__ = ["merge"]


def merge(
    files: Annotated[
        list[Path], typer.Argument(metavar="MODEL.safetensors...", help="Trained models, two or more; one with --base.")
    ],
    model: Annotated[str, typer.Option(help="Their architecture: mlp, lenet, ... or module:factory.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    method: Annotated[str, typer.Option(help="One of `fedmerge methods`.")] = "fedavg",
    weights: Annotated[str | None, typer.Option(help="A number each: 3,1. Equal where not given.")] = None,
    input_shape: Annotated[
        str | None, typer.Option(help="Of one example: 1,28,28. Else from the data, or tried.")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Number of classes, to be checked.")] = None,
    data: Annotated[Path | None, typer.Option(help="Safetensors with `inputs`, for methods that want data.")] = None,
    base: Annotated[Path | None, typer.Option(help="The model that all started from.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the method's random streams.")] = 0,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="OPTION=VALUE", help="Of the method, or model.OPTION.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Merge these tensors alone: encoder.*")
    ] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Do not merge these; they may differ in shape: head.*")
    ] = None,
    left_from: Annotated[str, typer.Option(help="Whose the rest is: first or base.")] = "first",
    pattern_weights: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=W1,W2", help="Weights for some tensors, 0 for no part: head.*=1,0"),
    ] = None,
    prefix: Annotated[
        list[str] | None, typer.Option(metavar="PREFIX", help="Drop this beginning of names in files: model.")
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Another beginning of names: bert.=encoder.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Buffers that stay the model's: *.position_ids")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Write several files with an index above this size: 5GB.")
    ] = None,
    no_code: NoCode = False,
) -> None:
    """Merge trained models, or checkpoints of runs, from files into a new file."""
    from fedmerge.offline.merge_files import merge_files, numbers
    from fedmerge.offline.tensor_files import pairs_of

    tell_code("--model", [model], refused=no_code)
    shape, shares = numbers(input_shape, "--input-shape", int), numbers(weights, "--weights", float)
    arguments: dict[str, Any] = {
        "input_shape": shape,
        "weights": shares,
        "classes": classes,
        "data": data,
        "base": base,
        "seed": seed,
        "only": only or None,
        "leave_out": leave_out or (),
        "left_from": left_from,
        "pattern_weights": _pattern_weights(pattern_weights),
        "rename": {**dict.fromkeys(prefix or (), ""), **pairs_of(rename or (), "--rename", "bert.=encoder.")},
        "ignore": ignore or (),
        "max_shard_size": max_shard_size,
    }
    typer.echo(merge_files(files, out, model=model, method=method, settings=assignments or (), **arguments))


def _pattern_weights(texts: list[str] | None) -> dict[str, Any] | None:
    from fedmerge.offline.merge_files import numbers
    from fedmerge.offline.tensor_files import pairs_of

    if not texts:
        return None
    pairs = pairs_of(texts, "--pattern-weights", "head.*=1,0")
    return {pattern: numbers(weights, "--pattern-weights", float) for pattern, weights in pairs.items()}
