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
    no_code: NoCode = False,
) -> None:
    """Merge trained models, or checkpoints of runs, from files into a new file."""
    from fedmerge.offline.merge_files import merge_files, numbers

    tell_code("--model", [model], refused=no_code)
    shape, shares = numbers(input_shape, "--input-shape", int), numbers(weights, "--weights", float)
    given: dict[str, Any] = {
        "input_shape": shape,
        "weights": shares,
        "classes": classes,
        "data": data,
        "base": base,
        "seed": seed,
    }
    typer.echo(merge_files(files, out, model=model, method=method, settings=assignments or (), **given))
