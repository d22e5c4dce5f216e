"""``fedmerge compare``, ``run`` and ``resume``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from fedmerge.commands.options import (
    Alpha,
    Clients,
    ConfigFile,
    DataDir,
    DataSet,
    Division,
    NoCode,
    OptionalConfig,
    Out,
    Overwrite,
    Set,
    default_out,
    given,
    own_parts,
    read_config,
    tell_code,
)
from fedmerge.commands.origin import at_origin, from_elsewhere, note_origin
from fedmerge.commands.verbosity import tell_error
from fedmerge.errors import ConfigError
from fedmerge.lookup.method_names import names_code, split_methods
from fedmerge.lookup.own_code import named_code

__all__ = ["compare", "resume", "run"]


def compare(
    config: OptionalConfig = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods, by comma: fedavg,fedfisher(variant=diag),fednova+server_adam.")
    ] = None,
    dataset: DataSet = None,
    model: Annotated[str | None, typer.Option(help="mlp, lenet, resnet8, ... or module:factory.")] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="What all start from: a .safetensors file, an index of shards, module:factory.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="classification, multilabel, regression, language_model, ... or module:Task.")
    ] = None,
    clients: Clients = None,
    partition: Division = None,
    alpha: Alpha = None,
    rounds: Annotated[int | None, typer.Option(help="Communication rounds.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds, from 0.")] = None,
    target: Annotated[float | None, typer.Option(help="Accuracy whose round is reported, such as 0.9.")] = None,
    workers: Annotated[str | None, typer.Option(help="auto, a number of Ray actors, or ray.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    data_dir: DataDir = None,
    observers: Annotated[
        str | None,
        typer.Option(help="Who watches, by comma: early_stopping(patience=3),tensorboard,mlflow,module:Observer."),
    ] = None,
    out: Out = None,
    assignments: Set = None,
    overwrite: Overwrite = False,
    no_code: NoCode = False,
) -> None:
    """Compare aggregators on one federation: curves, a table and records.

    A folder that holds a comparison of the same federation grows: runs that are finished stay, more methods, seeds or
    rounds are added, table and pictures cover everything.
    """
    flags = {
        "methods": None if methods is None else split_methods(methods),
        "rounds": rounds,
        "seeds": None if seeds is None else list(range(seeds)),
        "target": target,
        "workers": workers,
        "device": device,
        "data": given(name=dataset, dir=data_dir),
        "model": given(name=model, pretrained=pretrained),
        "task": given(name=task),
        "observers": None if observers is None else split_methods(observers),
        "partition": given(scheme=partition, clients=clients, alpha=alpha),
    }
    settings = read_config(config, given(**flags), assignments)
    tell_code(_named(config), [settings.model.name], settings.methods, refused=no_code, **_others([settings]))
    _run(settings, out, config, overwrite=overwrite, grow=not overwrite)


def run(
    config: ConfigFile,
    out: Out = None,
    assignments: Set = None,
    overwrite: Overwrite = False,
    no_code: NoCode = False,
) -> None:
    """Run one method on one seed, such as the config.toml of a record, again."""
    settings = read_config(config, {}, assignments)
    if len(settings.methods) != 1 or len(settings.seeds) != 1:
        raise ConfigError(
            f"{config} names {len(settings.methods)} methods and {len(settings.seeds)} seeds: "
            "`fedmerge run` takes one of each; use `fedmerge compare`, or narrow it down: "
            "--set 'methods=[\"fedavg\"]' --set 'seeds=[0]'"
        )
    tell_code(_named(config), [settings.model.name], settings.methods, refused=no_code, **_others([settings]))
    _run(settings, out, config, overwrite=overwrite, grow=False)


def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a comparison, or of one run.")],
    no_code: NoCode = False,
) -> None:
    """Go on with what was interrupted: every run continues after its last whole checkpoint.

    Finished runs stay, those not begun are started. On one worker the result is, to the last bit, that of a run
    which nobody disturbed. A folder that a command still writes to is refused. Modules and tables are looked for where
    they were found when the run was begun, from whichever folder this is called.
    """
    from fedmerge.commands.progress import Progress, interruptible
    from fedmerge.records.locks import LOCK, held
    from fedmerge.simulation.runs.compare import Outcome, compare
    from fedmerge.simulation.runs.unfinished import find_unfinished, finished_runs

    if (folder / LOCK).exists():  # one that has just begun has left nothing yet that could be found
        with held(folder / LOCK, folder):
            pass
    out, outcome = find_unfinished(folder).out, Outcome([], [])
    elsewhere, where = from_elsewhere(out), str(folder)
    if elsewhere:
        folder, out, where = folder.resolve(), out.resolve(), f"{folder}, begun in {elsewhere},"
    with interruptible(folder), held(out / LOCK, out), at_origin(out):
        unfinished = find_unfinished(folder)  # as it is, now that nobody else writes to it
        models = sorted({plan.model.name for plan in unfinished.configs})
        methods = [name for plan in unfinished.configs for name in plan.methods]
        tell_code(where, models, methods, refused=no_code, **_others(unfinished.configs))
        rounds = sum(config.rounds * len(config.methods) * len(config.seeds) for config in unfinished.configs)
        with Progress(unfinished.configs[0].rounds, rounds // unfinished.configs[0].rounds) as progress:
            for config in unfinished.configs:
                runs, failed = compare(config, out, progress, resume=True, locked=True)
                outcome.runs.extend(runs)
                outcome.failed.extend(failed)
        if unfinished.whole:
            _show(unfinished.configs[0], finished_runs(out), outcome.failed, out)
        else:
            _show_runs(outcome.runs, outcome.failed)


def _named(config: Path | None) -> str:
    return "the command line" if config is None else str(config)


def _others(configs: Iterable[Any]) -> dict[str, list[str]]:
    """Parts of the user's own besides models and methods, by kind."""
    attacks = [config.attack.kind for config in configs if config.attack is not None]
    parts = [("observer", [name for config in configs for name in config.observers]), ("attack", attacks)]
    tables = [table for config in configs for table in config.options.values()]
    parts += [("method", [value for table in tables for value in table.values() if names_code(value)])]
    parts += [("task", [name for config in configs for name in config.task.code])]
    parts += [("pretrained base", [name for config in configs for name in config.model.own_base])]
    parts += [part for config in configs for part in own_parts(config).items()]
    return {kind: [name for other, names in parts if other == kind for name in names] for kind, _ in parts}


def _is_elsewhere(config: Any) -> bool:
    """Whether it takes files besides fedmerge's own: modules, tables, or a folder of data."""
    from fedmerge.data.table import is_table

    code = named_code([config.model.name], config.methods, **_others([config]))
    return bool(code) or is_table(config.data.name) or config.data.dir is not None


def _run(config: Any, out: Path | None, file: Path | None, *, overwrite: bool, grow: bool) -> None:
    from fedmerge.commands.progress import Progress, interruptible
    from fedmerge.records.locks import LOCK, held
    from fedmerge.simulation.runs.compare import check_output, compare
    from fedmerge.simulation.runs.unfinished import check_not_begun, finished_runs

    folder = out or default_out(config)
    with interruptible(folder), held(folder / LOCK, folder):
        if not overwrite:
            check_not_begun(config, folder)
            check_output(config, folder)
        if _is_elsewhere(config):
            note_origin(folder, file)
        with Progress(config.rounds, len(config.methods) * len(config.seeds)) as progress:
            runs, failed = compare(config, folder, progress, grow=grow, locked=True)
        _show(config, finished_runs(folder) if grow else runs, failed, folder)


def _show(config: Any, runs: list[Path], failed: list[Any], folder: Path) -> None:
    """Table and pictures of a comparison."""
    from fedmerge.commands.conclusion import conclude
    from fedmerge.commands.tables import show, summary_table
    from fedmerge.plotting import read_runs
    from fedmerge.simulation.runs.results import write_results
    from fedmerge.simulation.runs.saved_partition import save_partition

    if runs:
        rows, target, paths = write_results(config, runs, folder)
        _, _, drawn = save_partition(config, config.seeds[0], folder)
        show(summary_table(rows, target))
        for path in [*paths, *drawn]:
            typer.echo(path)
        typer.echo(conclude(read_runs(runs)))
    _show_runs([], failed)


def _show_runs(runs: list[Path], failed: list[Any]) -> None:
    for folder in runs:
        typer.echo(folder)
    for run in failed:
        tell_error(run.error, f"{run.folder.name} failed: ")
    if failed:
        raise typer.Exit(2)
