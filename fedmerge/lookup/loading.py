"""Import what ``module:name`` names in a configuration: a model, a strategy, an observer ..."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

from fedmerge.errors import FedMergeError, nearest

__all__ = [
    "load_named",
]


def load_named(name: str, kind: str, part: str, example: str, error: type[FedMergeError]) -> Any:
    """What ``module:part`` names; the current directory is made importable, in front, as ``python -m`` does.

    Parameters
    ----------
    name
        Module and name in it, with a colon between them.
    kind, part, example
        What it is to be, for messages: a ``"model"``, made by a ``"factory"``, such as ``"my_models:small_cnn"``.
    error
        The error to raise.
    """
    if not name.strip():
        raise error(
            f"the name of the {kind} is empty and lacks a part: leave it out, or write 'module:{part}', such as "
            f"'{example}'"
        )
    module_name, _, own_name = name.partition(":")
    if not module_name or not own_name:
        raise error(f"{kind} {name!r} lacks a part. Write 'module:{part}', such as '{example}'.")
    written = f"{module_name.removesuffix('.py').removeprefix('./').replace('/', '.')}:{own_name.removesuffix('()')}"
    if written != name:
        raise error(f"{kind} {name!r}: a module goes without .py and slashes, a {part} without (). Write '{written}'.")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        # A module that draws weights while it is imported must not move the program's generator.
        with torch.random.fork_rng(devices=[]):
            module = importlib.import_module(module_name)
    except Exception as cause:  # a module may raise anything while it is imported
        missing = isinstance(cause, ModuleNotFoundError) and f"{module_name}.".startswith(f"{cause.name}.")
        remedy = "Run from the directory that holds the module, or install it" if missing else "Mend the module"
        raise error(
            f"{kind} {name!r}: cannot import module {module_name!r} ({type(cause).__name__}: {cause}) "
            f"to get {part} {own_name!r}. {remedy}, and see that 'python -c \"import {module_name}\"' works."
        ) from cause
    try:
        return getattr(module, own_name)
    except AttributeError as cause:
        guess = nearest(own_name, [known for known in vars(module) if not known.startswith("_")])
        raise error(
            f"{kind} {name!r}: module {module_name!r} ({getattr(module, '__file__', 'built in')}) has no "
            f"{part} {own_name!r}.{f' Did you mean {guess!r}?' if guess else ''} "
            "Define it there, or correct the name after the colon."
        ) from cause
