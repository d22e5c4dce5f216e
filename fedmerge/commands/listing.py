"""``fedmerge methods`` and ``partition``: what there is, and who holds what."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from fedmerge.commands.arguments import OptionalConfig, Out, Set, default_out, read_config

__all__ = ["methods", "partition"]


def methods(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the methods, what they need and their options."""
    from fedmerge.api import methods as known_methods
    from fedmerge.registry import entries

    known = known_methods()
    if as_json:
        typer.echo(json.dumps({name: dataclasses.asdict(info) for name, info in known.items()}, indent=2, default=str))
        return
    from fedmerge.commands.tables import methods_table, show

    show(methods_table(known, entries("server step"), entries("refinement")))


def partition(config: OptionalConfig = None, out: Out = None, assignments: Set = None) -> None:
    """Divide the data as a configuration says, and draw who holds which labels."""
    from fedmerge.commands.tables import partition_table, show
    from fedmerge.simulation.partitions import save_partition

    settings = read_config(config, {}, assignments)
    folder = out or default_out(settings)
    for seed in settings.seeds:
        counts, names, paths = save_partition(settings, seed, folder)
        show(partition_table(counts, names, seed))
        for path in paths:
            typer.echo(path)
