"""The ``fedmerge`` command."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fedmerge.api import methods as known_methods
from fedmerge.errors import ConfigError, FedMergeError
from fedmerge.method_names import split_methods
from fedmerge.registry import entries

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated learning in which the merge is the subject.",
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Configuration, see simulations/.")]
OptionalConfig = Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Configuration.")]
Out = Annotated[Path | None, typer.Option(help="Folder for records and pictures. Default: under runs/.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any configuration key.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace records of another configuration.")]


def main() -> None:
    """Run the command; a mistake of the user's ends with one clear line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    try:
        app()
    except FedMergeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


@app.command()
def compare(
    config: OptionalConfig = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods, by comma: fedavg,fedfisher(variant=diag),fednova+server_adam.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="digits, mnist, fashion_mnist, cifar10, ...")] = None,
    model: Annotated[str | None, typer.Option(help="mlp, lenet, resnet8, ... or module:factory.")] = None,
    clients: Annotated[int | None, typer.Option(help="Number of clients.")] = None,
    partition: Annotated[str | None, typer.Option(help="iid, dirichlet, shard, natural, ...")] = None,
    alpha: Annotated[float | None, typer.Option(help="Dirichlet concentration: smaller is more skewed.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Communication rounds.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds, from 0.")] = None,
    target: Annotated[float | None, typer.Option(help="Accuracy whose round is reported, such as 0.9.")] = None,
    workers: Annotated[str | None, typer.Option(help="auto, a number of Ray actors, or ray.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where data sets lie. Default: $FEDMERGE_DATA.")] = None,
    out: Out = None,
    assignments: Set = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare aggregators on one federation: curves, a table and records."""
    flags = {
        "methods": None if methods is None else split_methods(methods),
        "rounds": rounds,
        "seeds": None if seeds is None else list(range(seeds)),
        "target": target,
        "workers": workers,
        "device": device,
        "data": _given(name=dataset, dir=data_dir),
        "model": _given(name=model),
        "partition": _given(scheme=partition, clients=clients, alpha=alpha),
    }
    _run(_config(config, _given(**flags), assignments), out, overwrite=overwrite)


@app.command()
def run(config: ConfigFile, out: Out = None, assignments: Set = None, overwrite: Overwrite = False) -> None:
    """Run one method on one seed, such as the config.toml of a record, again."""
    settings = _config(config, {}, assignments)
    if len(settings.methods) != 1 or len(settings.seeds) != 1:
        raise ConfigError(
            f"{config} names {len(settings.methods)} methods and {len(settings.seeds)} seeds: "
            "`fedmerge run` takes one of each; use `fedmerge compare`, or narrow it down: "
            "--set 'methods=[\"fedavg\"]' --set 'seeds=[0]'"
        )
    _run(settings, out, overwrite=overwrite)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a comparison, or of one run.")],
) -> None:
    """Go on with what was interrupted: every run continues after its last whole checkpoint.

    Finished runs stay, those not begun are started. On one worker the result is, to the last bit, that of a run
    which nobody disturbed. Make sure that the interrupted command is no longer running.
    """
    from fedmerge.report import Progress, interruptible
    from fedmerge.simulation.compare import Outcome, compare
    from fedmerge.simulation.unfinished import find_unfinished

    found = find_unfinished(folder)
    outcome = Outcome([], [])
    rounds = sum(config.rounds * len(config.methods) * len(config.seeds) for config in found.configs)
    with interruptible(folder), Progress(found.configs[0].rounds, rounds // found.configs[0].rounds) as progress:
        for config in found.configs:
            runs, failed = compare(config, found.out, progress, resume=True)
            outcome.runs.extend(runs)
            outcome.failed.extend(failed)
    if found.whole:
        _show(found.configs[0], outcome.runs, outcome.failed, found.out)
    else:
        _show_runs(outcome.runs, outcome.failed)


@app.command()
def plot(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of comparisons or of runs.")],
    out: Annotated[Path | None, typer.Option(help="The picture; else <kind>.png in the first folder.")] = None,
    target: Annotated[float | None, typer.Option(help="Accuracy to mark.")] = None,
    kind: Annotated[
        Literal["convergence", "traffic"], typer.Option(help="Against rounds and seconds, or against bytes sent.")
    ] = "convergence",
) -> None:
    """Draw curves of finished runs."""
    from fedmerge.plotting import plot_convergence, plot_traffic

    path = out or folders[0] / f"{kind}.png"
    typer.echo(plot_traffic(folders, path) if kind == "traffic" else plot_convergence(folders, path, target=target))


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="MODEL.safetensors...", help="Trained models, two or more.")],
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
) -> None:
    """Merge trained models from files into a new file."""
    from fedmerge.merge_files import merge_files, numbers

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


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the methods, what they need and their options."""
    known = known_methods()
    if as_json:
        typer.echo(json.dumps({name: dataclasses.asdict(info) for name, info in known.items()}, indent=2, default=str))
        return
    from fedmerge.report import methods_table, show

    show(methods_table(known, entries("server step"), entries("refinement")))


@app.command()
def partition(config: OptionalConfig = None, out: Out = None, assignments: Set = None) -> None:
    """Divide the data as a configuration says, and draw who holds which labels."""
    from fedmerge.report import partition_table, show
    from fedmerge.simulation.partitions import save_partition

    settings = _config(config, {}, assignments)
    folder = out or _default_out(settings)
    for seed in settings.seeds:
        counts, names, paths = save_partition(settings, seed, folder)
        show(partition_table(counts, names, seed))
        for path in paths:
            typer.echo(path)


@app.command()
def bench(
    workloads: Annotated[str, typer.Option(help="By comma.")] = "W1,W2,W3,W3-million",
    systems: Annotated[
        str, typer.Option(help="By comma: loop, stacked, fedmerge, fedmerge-ray.")
    ] = "loop,stacked,fedmerge",
    workers: Annotated[int, typer.Option(min=1, help="Of fedmerge; more than 1 are Ray actors.")] = 1,
    rounds: Annotated[
        int | None, typer.Option(min=2, help="Instead of each workload's own; the first is not counted.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cuda adds W1 and W2 on the GPU.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Of data, model, sampling and batches.")] = 0,
    data_dir: Annotated[Path | None, typer.Option(help="Where data sets lie. Default: $FEDMERGE_DATA.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each workload and system.")] = False,
) -> None:
    """Measure simulated rounds beside plain PyTorch that does the same work, in turn within one run."""
    from fedmerge.bench.command import run_bench
    from fedmerge.bench.report import speed_table
    from fedmerge.report import show

    measured = []
    for row in run_bench(
        _split(workloads), _split(systems), workers=workers, rounds=rounds, device=device, seed=seed, data_dir=data_dir
    ):
        measured.append(row)
        if as_json:
            typer.echo(json.dumps(row))
    if not as_json:
        show(speed_table(measured))


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _given(**values: Any) -> dict[str, Any]:
    """Only what was given: None and empty tables are not."""
    return {name: value for name, value in values.items() if value is not None and value != {}}


def _config(path: Path | None, flags: dict[str, Any], assignments: list[str] | None) -> Any:
    from fedmerge.simulation.config import load_config, make_config, parse_assignment

    file = {} if path is None else load_config(path)
    return make_config(file, flags, *map(parse_assignment, assignments or []))


def _default_out(config: Any) -> Path:
    split = config.partition.scheme
    if split in ("dirichlet", "quantity"):
        split += f"{config.partition.alpha:g}"
    return Path("runs") / f"{config.data.name}-{config.model.name.replace(':', '.')}-{split}"


def _run(config: Any, out: Path | None, *, overwrite: bool) -> None:
    from fedmerge.report import Progress, interruptible
    from fedmerge.simulation.compare import check_output, compare

    folder = out or _default_out(config)
    if not overwrite:
        check_output(config, folder)
    with interruptible(folder), Progress(config.rounds, len(config.methods) * len(config.seeds)) as progress:
        runs, failed = compare(config, folder, progress)
    _show(config, runs, failed, folder)


def _show(config: Any, runs: list[Path], failed: list[Any], folder: Path) -> None:
    """Table and pictures of a comparison."""
    from fedmerge.report import show, summary_table
    from fedmerge.simulation.partitions import save_partition
    from fedmerge.simulation.results import write_results

    if runs:
        rows, target, paths = write_results(config, runs, folder)
        _, _, drawn = save_partition(config, config.seeds[0], folder)
        show(summary_table(rows, target))
        for path in [*paths, *drawn]:
            typer.echo(path)
    _show_runs([], failed)


def _show_runs(runs: list[Path], failed: list[Any]) -> None:
    for folder in runs:
        typer.echo(folder)
    for run in failed:
        typer.echo(f"error: {run.folder.name} failed: {run.error}", err=True)
    if failed:
        raise typer.Exit(2)


if __name__ == "__main__":
    main()
