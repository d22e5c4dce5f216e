"""``fedmerge models``, ``datasets`` and ``list``: what there is of every kind, with options and defaults."""

from __future__ import annotations

import json
from typing import Annotated

import typer

__all__ = ["datasets", "list_parts", "models"]

Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Only these, with all about them.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def models(names: Names = None, as_json: AsJson = False) -> None:
    """List the models and their options; with a name, tell all about one."""
    _tell("model", names, as_json=as_json)


def datasets(names: Names = None, as_json: AsJson = False) -> None:
    """List the data sets and their options; with a name, tell all about one."""
    from fedmerge.data.table import is_table

    # A file stands for the data set that reads it.
    _tell("data set", names and ["table" if is_table(name) else name for name in names], as_json=as_json)


def list_parts(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="Such as observers, tasks or attacks; all kinds without.")
    ] = None,
    names: Names = None,
    as_json: AsJson = False,
) -> None:
    """List everything of one kind, those of other installed packages included."""
    from fedmerge.errors import UnknownName
    from fedmerge.lookup.kinds import KINDS, kind_of

    if kind is None:
        from fedmerge.commands.tables import kinds_table, show

        kinds = {known_kind.plural.replace("_", "-"): known_kind for known_kind in KINDS.values()}
        if as_json:
            typer.echo(
                json.dumps({word: {"entry_points": known_kind.group} for word, known_kind in kinds.items()}, indent=2)
            )
        else:
            show(kinds_table(kinds))
        return
    wanted = kind_of("aggregator" if kind in ("method", "methods") else kind)
    if wanted is None:
        raise UnknownName("kind", kind, (known_kind.plural.replace("_", "-") for known_kind in KINDS.values()))
    _tell(wanted.name, names, as_json=as_json)


def _tell(kind: str, names: list[str] | None, *, as_json: bool) -> None:
    from fedmerge.commands.tables import part_facts, part_text, parts_table, show
    from fedmerge.registry import entries, entry

    known = [entry(kind, name) for name in names] if names else list(entries(kind).values())
    if as_json:
        typer.echo(json.dumps({part.name: part_facts(part) for part in known}, indent=2, default=str))
    elif names:
        typer.echo("\n\n".join(map(part_text, known)))
    else:
        show(parts_table(kind, known))
