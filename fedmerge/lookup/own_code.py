"""Code that a configuration names and fedmerge would run: found before it is imported, told, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fedmerge.errors import ConfigError
from fedmerge.lookup.method_names import own_parts

__all__ = ["check_no_code", "named_code"]

# Flower is there anyway, and what it exports under such names are classes of strategies.
_FLOWERS = re.compile(r"flwr\.serverapp\.strategy:[A-Z]\w*")


def named_code(models: Iterable[str], methods: Iterable[str] = (), **others: Iterable[str]) -> list[str]:
    """What would be imported and called, in words: ``module:factory`` as a model, ``module:function`` as a method ...

    Flower's own strategies do not count. Methods that installed packages register are not seen here: they run once the
    package is installed.

    Parameters
    ----------
    models
        Names of models.
    methods
        Methods as they are written, options included.
    others
        Parts of other kinds as they are written, by the kind's name: ``observer=["mine:Watching"]``.

    Examples
    --------
    >>> named_code(["mlp", "mine:cnn"], ["fedavg", "mine:Trim+mine:Mean(rate=1)", "flwr.serverapp.strategy:FedAvgM"])
    ['model mine:cnn', 'method mine:Trim', 'method mine:Mean']
    """
    named = [f"model {name}" for name in models if ":" in name]
    parts = [part.name for method in methods for part in own_parts(method)]
    named += [f"method {name}" for name in parts if not _FLOWERS.fullmatch(name)]
    for kind, names in others.items():
        named += [f"{kind} {part.name}" for name in names for part in own_parts(name)]
    return list(dict.fromkeys(named))


def check_no_code(where: str, code: Iterable[str]) -> None:
    """Refuse to run any.

    Parameters
    ----------
    where
        Who names it, to begin the message with.
    code
        What :func:`named_code` found.

    Raises
    ------
    ConfigError
        There is some.

    Examples
    --------
    >>> check_no_code("run.toml", ["model mine:cnn"])
    Traceback (most recent call last):
        ...
    fedmerge.errors.ConfigError: run.toml runs code: model mine:cnn. Read it, and leave out --no-code where you trust it
    """
    listed = ", ".join(code)
    if listed:
        raise ConfigError(f"{where} runs code: {listed}. Read it, and leave out --no-code where you trust it")
