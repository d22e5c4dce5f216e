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
    columns: Annotated[
        int | None, typer.Option(help="For print: as wide as 1 column (3.4 inches) or 2 (7 inches).")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Panels, by comma: rounds,megabytes,steps,seconds.")] = None,
) -> None:
    """Draw curves of finished runs; the ending of --out decides: .png, .pdf or .svg."""
    from fedmerge.plotting import plot_convergence, plot_traffic

    path = out or folders[0] / f"{kind}.png"
    words = None if labels is None else [word.strip() for word in labels.split(",")]
    if kind == "traffic":
        typer.echo(plot_traffic(folders, path, labels=words, columns=columns))
        return
    panels = None if against is None else [name.strip() for name in against.split(",")]
    typer.echo(plot_convergence(folders, path, target=target, labels=words, columns=columns, against=panels))
