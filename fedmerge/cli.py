"""The ``fedmerge`` command: its subcommands stand in :mod:`fedmerge.commands`."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import click
import typer

import fedmerge
from fedmerge.commands import benching, comparing, listing, merging, parts, pretraining
from fedmerge.commands import plotting_command as drawing
from fedmerge.commands.ending import heeding_signals
from fedmerge.commands.hints import HelpfulCommand, HelpfulGroup
from fedmerge.commands.verbosity import log_to_terminal, set_verbosity, tell_error
from fedmerge.errors import FedMergeError

__all__ = ["app", "main"]

app = typer.Typer(
    cls=HelpfulGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated learning in which the merge is the subject.",
)
for command in (
    comparing.compare,
    comparing.run,
    comparing.resume,
    pretraining.pretrain,
    drawing.plot,
    merging.merge,
    listing.methods,
    parts.models,
    parts.datasets,
    listing.partition,
    benching.bench,
):
    app.command(cls=HelpfulCommand)(command)
app.command("list", cls=HelpfulCommand)(parts.list_parts)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedmerge {fedmerge.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Federated learning in which the merge is the subject."""


def main() -> None:
    """Run the command; a mistake of the user's ends with one clear line and exit code 2, a signal with 128 and its
    number.
    """
    log_to_terminal()
    command = typer.main.get_command(app)
    _add_verbosity(command)
    with heeding_signals() as asked:
        try:
            command(prog_name="fedmerge")
        except FedMergeError as error:
            tell_error(error)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(128 + (asked or [signal.SIGINT])[0])
        except SystemExit as done:
            # What click makes of it; Ray makes it a plain Ctrl-C where it waits.
            if asked and done.code in (None, 1, 128 + signal.SIGINT):
                sys.exit(128 + asked[0])
            raise


def _add_verbosity(command: click.Command) -> None:
    """Let every command be told how much to say, before its name or behind it."""
    for each in (command, *getattr(command, "commands", {}).values()):
        for names, level, words in (
            (("-v", "--verbose"), "verbose", "Tell more, Flower's own log included."),
            (("-q", "--quiet"), "quiet", "Only results and errors: no progress, no warnings."),
        ):

            def tell(context: click.Context, option: click.Parameter, value: bool, level: str = level) -> None:
                if value:
                    set_verbosity(level)

            each.params.append(click.Option(names, is_flag=True, expose_value=False, callback=tell, help=words))


if __name__ == "__main__":
    main()
