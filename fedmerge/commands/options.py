"""Arguments that several commands take, and the configuration that they make."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from fedmerge.commands.origin import make_importable
from fedmerge.commands.verbosity import quiet
from fedmerge.errors import ConfigError
from fedmerge.lookup.own_code import check_no_code, named_code
from fedmerge.plain_text import one_line

__all__ = [
    "Alpha",
    "Clients",
    "ConfigFile",
    "DataDir",
    "DataSet",
    "Division",
    "NoCode",
    "OptionalConfig",
    "Out",
    "Overwrite",
    "Set",
    "default_out",
    "given",
    "own_parts",
    "read_config",
    "tell_code",
]

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Configuration, see simulations/.")]
OptionalConfig = Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Configuration.")]
DataSet = Annotated[str | None, typer.Option("--dataset", help="digits, mnist, ..., a .csv, or module:function.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Where data sets lie. Default: $FEDMERGE_DATA.")]
Clients = Annotated[int | None, typer.Option("--clients", help="Number of clients.")]
Division = Annotated[
    str | None, typer.Option("--partition", help="iid, dirichlet, shard, natural, ..., or module:function.")
]
Alpha = Annotated[float | None, typer.Option("--alpha", help="Dirichlet concentration: smaller is more skewed.")]
Out = Annotated[Path | None, typer.Option(help="Folder for records and pictures. Default: under runs/.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any configuration key.")]
NoCode = Annotated[bool, typer.Option("--no-code", help="Refuse module:factory and module:function, which run code.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace records of another configuration.")]


def given(**values: Any) -> dict[str, Any]:
    """Only what was given: None and empty tables are not."""
    return {name: value for name, value in values.items() if value is not None and value != {}}


def tell_code(
    where: str, models: Iterable[str], methods: Iterable[str] = (), *, refused: bool, **others: Iterable[str]
) -> None:
    """Say which code will be imported and run, before it is; or end here, where it is `refused`."""
    code = named_code(models, methods, **others)
    if refused:
        check_no_code(where, code)
    if code and not quiet():
        typer.echo(one_line(f"{where} runs code: {', '.join(code)}", 4000), err=True)


def own_parts(config: Any) -> dict[str, list[str]]:
    """Data set, domains, division and training of a configuration, which may be code, by what they are."""
    from fedmerge.data.table import is_table

    data = config.data.name
    parts = {
        "data set": [] if is_table(data) else [data],
        "domain": list(config.data.domains),
        "partition": [config.partition.scheme],
    }
    return {**parts, **config.training.own_code}


def read_config(
    path: Path | None, flags: dict[str, Any], assignments: list[str] | None, *, without: Iterable[str] = ()
) -> Any:
    """The configuration of a file, but for some keys, overridden by flags, overridden by ``--set``."""
    from fedmerge.simulation.runs.config import load_config, make_config, parse_assignment

    layers = [flags, *map(parse_assignment, assignments or [])]
    if path is not None and not path.is_file():
        raise ConfigError(_no_file(path))
    file = {} if path is None else _beside(path, _without(load_config(path), without))
    config = make_config(file, *layers)
    _check_division(config.partition.scheme, layers)
    return config


def _without(settings: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Nested settings but for these, ``section.key`` or ``key``."""
    dropped = set(keys)
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        if key in dropped:
            continue
        inner = {flag.partition(".")[2] for flag in dropped if flag.startswith(f"{key}.")}
        kept[key] = _without(value, inner) if inner and isinstance(value, dict) else value
    return kept


def _beside(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A file's settings, with a table or a base that lies beside it named by its path, and modules there importable."""
    folder = path.parent.resolve()
    make_importable(folder)
    from fedmerge.models.pretrained import is_base_file

    model = settings.get("model")
    base = model.get("pretrained") if isinstance(model, dict) else None
    if isinstance(model, dict) and isinstance(base, str) and is_base_file(base):
        settings = {**settings, "model": {**model, "pretrained": str(folder / Path(base).expanduser())}}
    data = settings.get("data")
    name = data.get("name") if isinstance(data, dict) else None
    if isinstance(data, dict) and isinstance(name, str) and not Path(name).is_file():
        beside = path.parent / name
        if beside.is_file():
            return {**settings, "data": {**data, "name": str(beside)}}
    return settings


_DIVISIONS = {
    "alpha": ("dirichlet", "quantity"),
    "column": ("column",),
    "classes_per_client": ("pathological",),
    "shards_per_client": ("shard",),
    "groups": ("by_class_groups",),
}


def _check_division(scheme: str, layers: list[dict[str, Any]]) -> None:
    """Refuse what the division into clients has no use for, where the command line asks for it."""
    for layer in layers:
        division = layer.get("partition")
        for name, schemes in _DIVISIONS.items():
            if isinstance(division, dict) and name in division and scheme not in schemes:
                raise ConfigError(
                    f"{name} = {division[name]} means nothing to the partition {scheme!r}: "
                    f"leave it out, or choose --partition {' or '.join(schemes)}"
                )


def _no_file(path: Path) -> str:
    """What to write in place of a configuration file that is none."""
    if path.is_dir():
        runs = [file for file in (path / "config.toml", *sorted(path.glob("*/config.toml"))) if file.exists()]
        remedy = f"such as {runs[0]}" if runs else "such as those under simulations/ in the repository"
        return f"{path} is a folder: name a configuration file, {remedy}"
    from fedmerge.data.sources import dataset_names
    from fedmerge.models import model_names
    from fedmerge.registry import entries, usual_names

    name = str(path)
    if name in dataset_names():
        remedy = f"a data set goes behind a flag: --dataset {name}"
    elif name in model_names():
        remedy = f"a model goes behind a flag: --model {name}"
    elif name.partition("(")[0].partition("+")[0] in {*entries("aggregator"), *usual_names()}:
        remedy = f"methods stand together, with commas and without blanks: --methods fedavg,{name}"
    elif name == "help":
        remedy = "help is a flag: --help"
    else:
        remedy = f"the current folder is {Path.cwd()}; examples are under simulations/ in the repository"
    return f"there is no configuration file {name}: {remedy}"


def default_out(config: Any) -> Path:
    """Where records go that were given no place."""
    split = config.partition.scheme
    if split in ("dirichlet", "quantity"):
        split += f"{config.partition.alpha:g}"
    data = config.data.name.replace(":", ".")
    data = Path(data).name if "/" in data else data
    return Path("runs") / f"{data}-{config.model.name.replace(':', '.')}-{split.replace(':', '.')}"
