"""Names of methods: one decorator registers a class, and the whole folder is found by itself."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedmerge.errors import FedMergeError, InvalidOption, UnknownName

__all__ = ["ENTRY_POINTS", "Entry", "build", "entries", "entry", "find", "register", "usual_names"]

ENTRY_POINTS = "fedmerge.aggregators"
"""Entry-point group under which other packages offer modules that register methods."""

Registered = TypeVar("Registered", bound=type)


@dataclass(frozen=True)
class Entry:
    """A registered class: its name, its paper, and what its docstring and fields say."""

    name: str
    kind: str
    paper: str
    cls: type
    alone: str = ""
    """What people call plain averaging that is followed by it, as ``fedadam`` is ``fedavg+server_adam``."""

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.cls) or "").partition("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """Hyper-parameters with their defaults."""
        return {field.name: field.default for field in dataclasses.fields(self.cls)}


_ENTRIES: dict[str, Entry] = {}


def register(name: str, *, paper: str = "", alone: str = "") -> Callable[[Registered], Registered]:
    """Register a frozen dataclass, an aggregator, a refinement or a server step, under `name`.

    Parameters
    ----------
    name
        Lower case, as people will type it.
    paper
        Where the method comes from, such as ``"arXiv:1602.05629"``.
    alone
        For a server step, the usual name of plain averaging that is followed by it, such as ``"fedadam"``.

    Raises
    ------
    FedMergeError
        The class is no frozen dataclass, or the name is taken.
    """

    def decorate(cls: Registered) -> Registered:
        params = getattr(cls, "__dataclass_params__", None)
        if params is None or not params.frozen:
            raise FedMergeError(f"{cls.__qualname__}: put @dataclass(frozen=True) below @register({name!r})")
        known = _ENTRIES.get(name)
        if known is not None and (known.cls.__module__, known.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise FedMergeError(f"method name {name!r} is taken by {known.cls.__module__}.{known.cls.__qualname__}")
        _ENTRIES[name] = Entry(name, cls.kind, paper, cls, alone)  # type: ignore[attr-defined]
        return cls

    return decorate


@functools.cache
def _discover() -> None:
    """Import what registers: aggregators, refinements, and what other installed packages announce."""
    for folder in ("fedmerge.aggregators", "fedmerge.refine"):
        package = importlib.import_module(folder)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:
            raise FedMergeError(
                f"entry point {point.name!r} ({point.value}) of group {ENTRY_POINTS!r} fails to load: {error!r}; "
                "mend or uninstall the package that brings it"
            ) from error


def entries(kind: str) -> Mapping[str, Entry]:
    """Everything registered of one kind, by name: ``"aggregator"``, ``"refinement"`` or ``"server step"``."""
    _discover()
    return {name: found for name, found in sorted(_ENTRIES.items()) if found.kind == kind}


def usual_names() -> Mapping[str, str]:
    """Server steps by the name that plain averaging has which is followed by them.

    Examples
    --------
    >>> usual_names()["fedavgm"]
    'server_momentum'
    """
    return {found.alone: name for name, found in entries("server step").items() if found.alone}


def entry(kind: str, name: str) -> Entry:
    """One registered class.

    Raises
    ------
    UnknownName
        Nothing of that name and kind is registered.
    """
    known = entries(kind)
    if name not in known:
        if kind == "aggregator":
            remedy = _how_to_write(name)
            raise UnknownName("method", name, () if remedy else [*known, *usual_names()], remedy)
        raise UnknownName(kind, name, known)
    return known[name]


def find(name: str) -> Entry:
    """A method, server step or refinement by its name, or by the usual name of plain averaging with a server step.

    Raises
    ------
    UnknownName
        Nothing of that name is registered.

    Examples
    --------
    >>> find("ridge_head").kind, find("fedadam").name
    ('refinement', 'server_adam')
    """
    plain = usual_names().get(name, name.removeprefix("+"))
    for kind in ("server step", "refinement"):
        if plain in entries(kind):
            return entries(kind)[plain]
    return entry("aggregator", plain)


def _how_to_write(name: str) -> str:
    """What to write instead, where `name` is something else than a method that is misspelt."""
    if name in entries("server step") or name in entries("refinement"):
        return f"{name!r} goes behind a method: fedavg+{name}."
    if name.split()[1:]:
        return f"Methods are separated by commas: {','.join(name.split())}."
    module, _, last = name.rpartition(".")
    return f"A Flower strategy is written with a colon: {module}:{last}." if module else ""


def build(kind: str, name: str, options: Mapping[str, Any]) -> Any:
    """Make the registered class with checked options; text such as ``"0.5"`` becomes what the field wants.

    Raises
    ------
    UnknownName
        No such method, or no such option of it.
    InvalidOption
        An option of the wrong type or outside its range.

    Examples
    --------
    >>> build("aggregator", "fedatt", {"step_size": "1.0"}).step_size
    1.0
    """
    found = entry(kind, name)
    hints = get_type_hints(found.cls)
    checked = {}
    for key, value in options.items():
        if key not in found.options:
            raise UnknownName(f"option of {name}", key, found.options)
        try:
            adapter = TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True))
            checked[key] = adapter.validate_python(value)
        except ValidationError as error:
            reasons = "; ".join(sorted({detail["msg"] for detail in error.errors()}))
            raise InvalidOption(f"{name}: option {key} = {value!r} is not valid: {reasons}") from error
    return found.cls(**checked)
