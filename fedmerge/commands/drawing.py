"""``fedmerge plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["plot"]


def plot(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of comparisons or of runs.")],
    out: Annotated[Path | None, typer.Option(help="The picture; else <kind>.png in the first folder.")] = None,
    target: Annotated[float | None, typer.Option(help="Accuracy to mark.")] = None,
    kind: Annotated[
        Literal["convergence", "traffic"], typer.Option(help="Against rounds and seconds, or against bytes sent.")
    ] = "convergence",
    labels: Annotated[
        str | None, typer.Option(help="A word for each folder, by comma, where folders hold the same methods.")
    ] = None,
) -> None:
    """Draw curves of finished runs; the ending of --out decides: .png, .pdf or .svg."""
    from fedmerge.plotting import plot_convergence, plot_traffic

    path = out or folders[0] / f"{kind}.png"
    words = None if labels is None else [word.strip() for word in labels.split(",")]
    if kind == "traffic":
        typer.echo(plot_traffic(folders, path, labels=words))
    else:
        typer.echo(plot_convergence(folders, path, target=target, labels=words))
