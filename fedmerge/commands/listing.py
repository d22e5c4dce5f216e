"""``fedmerge methods`` and ``partition``: what there is, and who holds what."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from fedmerge.commands.options import (
    Alpha,
    Clients,
    DataDir,
    DataSet,
    Division,
    NoCode,
    OptionalConfig,
    Out,
    Set,
    default_out,
    given,
    own_parts,
    read_config,
    tell_code,
)

__all__ = ["methods", "partition"]


def methods(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Only these, with everything about them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the methods, what they need and their options; with a name, tell all about one."""
    from fedmerge.api import methods as known_methods
    from fedmerge.registry import entries, find

    known = known_methods()
    if names:
        if as_json:
            known = {entry.name: known[entry.name] for entry in map(find, names) if entry.name in known}
        else:
            from fedmerge.commands.tables import part_text

            typer.echo("\n\n".join(part_text(find(name)) for name in names))
            return
    if as_json:
        typer.echo(json.dumps({name: dataclasses.asdict(info) for name, info in known.items()}, indent=2, default=str))
        return
    from fedmerge.commands.tables import methods_table, show

    show(methods_table(known, entries("edit"), entries("server step"), entries("refinement"), entries("trajectory")))


def partition(
    config: OptionalConfig = None,
    dataset: DataSet = None,
    clients: Clients = None,
    scheme: Division = None,
    alpha: Alpha = None,
    data_dir: DataDir = None,
    out: Out = None,
    assignments: Set = None,
    no_code: NoCode = False,
) -> None:
    """Divide the data as a configuration says, and draw who holds which labels."""
    from fedmerge.commands.tables import partition_table, show
    from fedmerge.simulation.runs.saved_partition import save_partition

    flags = {
        "data": given(name=dataset, dir=data_dir),
        "partition": given(scheme=scheme, clients=clients, alpha=alpha),
    }
    settings = read_config(config, given(**flags), assignments)
    tell_code("the command line" if config is None else str(config), [], refused=no_code, **own_parts(settings))
    folder = out or default_out(settings)
    for seed in settings.seeds:
        counts, names, paths = save_partition(settings, seed, folder)
        show(partition_table(counts, names, seed))
        for path in paths:
            typer.echo(path)
