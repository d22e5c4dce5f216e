"""Words for flags that a command does not have, where somebody means a setting of the configuration."""

from __future__ import annotations

from typing import Any

import click
from typer.core import TyperCommand, TyperGroup

__all__ = ["HelpfulCommand", "HelpfulGroup"]

# More than one value behind one of these is what people write for a list.
_LISTS = ("--methods", "--observers", "--labels", "--against", "--workloads", "--systems", "--weights")


class HelpfulCommand(TyperCommand):
    """A command that tells how to set what it has no flag for."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command line."""
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            remedy = self._remedy(error.option_name)
            if remedy is None:
                raise
            raise click.UsageError(f"No such option '{error.option_name}'. {remedy}", ctx) from error
        except click.BadParameter:
            raise
        except click.UsageError as error:
            lists = [flag for flag in _LISTS if flag in words]
            if "unexpected extra argument" in error.message and lists:
                remedy = f"Behind {lists[0]} stands one word: commas, no blanks, or quotes around it."
                raise click.UsageError(f"{error.message}. {remedy}", ctx) from error
            raise

    def _remedy(self, flag: str) -> str | None:
        """Which flag, or which ``--set``, says what `flag` is to say."""
        if not any(parameter.name == "config" for parameter in self.params) or not flag.startswith("--"):
            return None
        from fedmerge.simulation.runs.config_keys import meant
        from fedmerge.simulation.runs.config_model import Config

        key = meant(flag.removeprefix("--"), Config)
        if key is None:
            return None
        flags = [name for parameter in self.params for name in parameter.opts if name == _flag(key)]
        return f"Did you mean {flags[0]}?" if flags else f"Write --set {key}=VALUE."


class HelpfulGroup(TyperGroup):
    """Commands, of which a misspelt one is told once."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command that the first word names."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            message = error.message  # Typer has put into it what click would add a second time
            if "Did you mean" not in message:
                message += f" There are {', '.join(self.commands)}; `fedmerge --help` tells what they do."
            raise click.UsageError(message, ctx) from error


def _flag(key: str) -> str:
    usual = {"data.name": "--dataset", "data.dir": "--data-dir", "partition.scheme": "--partition"}
    return usual.get(key, f"--{key.rpartition('.')[2]}".replace("_", "-"))
