"""Arguments that several commands take, and the configuration that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["ConfigFile", "OptionalConfig", "Out", "Overwrite", "Set", "default_out", "given", "read_config"]

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Configuration, see simulations/.")]
OptionalConfig = Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Configuration.")]
Out = Annotated[Path | None, typer.Option(help="Folder for records and pictures. Default: under runs/.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any configuration key.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace records of another configuration.")]


def given(**values: Any) -> dict[str, Any]:
    """Only what was given: None and empty tables are not."""
    return {name: value for name, value in values.items() if value is not None and value != {}}


def read_config(path: Path | None, flags: dict[str, Any], assignments: list[str] | None) -> Any:
    """The configuration of a file, overridden by flags, overridden by ``--set``."""
    from fedmerge.simulation.config import load_config, make_config, parse_assignment

    file = {} if path is None else load_config(path)
    return make_config(file, flags, *map(parse_assignment, assignments or []))


def default_out(config: Any) -> Path:
    """Where records go that were given no place."""
    split = config.partition.scheme
    if split in ("dirichlet", "quantity"):
        split += f"{config.partition.alpha:g}"
    return Path("runs") / f"{config.data.name}-{config.model.name.replace(':', '.')}-{split}"
