"""Tensors of models' files under the names that the model gives them, without those that count for nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor, nn

from fedmerge.checks.mergeable import check_mergeable
from fedmerge.errors import ConfigError, UnknownName
from fedmerge.records.model_tensors import read_state, renamed
from fedmerge.state import module_state

__all__ = ["FileNames", "pairs_of"]


@dataclass(frozen=True)
class FileNames:
    """How files name a model's tensors.

    Parameters
    ----------
    prefixes
        New beginnings of names by old ones, see :func:`~fedmerge.records.model_tensors.renamed`. A file in which no
        name begins so is left as it is.
    ignore
        Patterns of buffers that files may have or not: the model keeps those that it is built with.
    """

    prefixes: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()

    def read(self, files: Sequence[Path]) -> tuple[list[dict[str, Tensor]], set[str]]:
        """The tensors of files, as the model names them, and all names that there are, ignored ones included.

        Raises
        ------
        ModelError
            A file cannot be read.
        UnknownName
            No name in any file begins with one of the prefixes.
        """
        states = [read_state(file) for file in files]
        for old in self.prefixes:
            if not any(name.startswith(old) for state in states for name in state):
                raise UnknownName("beginning of names in the files:", old, {name for state in states for name in state})
        models, names = [], set[str]()
        for file, state in zip(files, states, strict=True):
            fitting = {old: new for old, new in self.prefixes.items() if any(name.startswith(old) for name in state)}
            named = renamed(state, fitting, str(file))
            names.update(state, named)
            before = dict(zip(named, state, strict=True))
            kept = {n: tensor for n, tensor in named.items() if not (self.ignores(n) or self.ignores(before[n]))}
            check_mergeable(str(file), kept)
            models.append(kept)
        return models, names

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this name counts for nothing."""
        return any(fnmatchcase(name, pattern) for pattern in self.ignore)

    def check_ignored(self, built: nn.Module, names: set[str]) -> None:
        """Make sure that each pattern is the name of something in the model or in files, and of buffers only.

        Raises
        ------
        UnknownName
            It is the name of nothing.
        ConfigError
            It is the name of a parameter.
        """
        known = names | set(module_state(built)[0])
        for pattern in self.ignore:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise UnknownName("tensor in --ignore", pattern, known)
        for name, _ in built.named_parameters(remove_duplicate=False):
            if self.ignores(name):
                raise ConfigError(
                    f"--ignore is for buffers, and {name!r} is a parameter of the model, which would stay as it is "
                    "initialised: take --leave-out, which keeps that of the first file"
                )

    def kept_of(self, built: nn.Module) -> dict[str, Tensor]:
        """What the model keeps as it was built."""
        return {name: tensor for name, tensor in module_state(built)[0].items() if self.ignores(name)}


def pairs_of(texts: Sequence[str], option: str, example: str) -> dict[str, str]:
    """What stands before and behind the last ``=`` of each text.

    Raises
    ------
    ConfigError
        There is none.

    Examples
    --------
    >>> pairs_of(["head.*=1,0"], "--pattern-weights", "head.*=1,0")
    {'head.*': '1,0'}
    """
    names: dict[str, str] = {}
    for text in texts:
        before, equals, behind = text.rpartition("=")
        if not equals:
            raise ConfigError(f"{option} wants a pair such as {example}, got {text!r}")
        if names.setdefault(before, behind) != behind:
            raise ConfigError(f"{option} says two things of {before!r}: {names[before]!r} and {behind!r}")
    return names
