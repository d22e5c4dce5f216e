"""Names of parts: one decorator registers a class or function, and whole folders are found by themselves."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fedmerge.errors import ConfigError, FedMergeError, UnknownName
from fedmerge.lookup.entry_points import load_entry_points
from fedmerge.lookup.kinds import KINDS, METHOD_KINDS, Kind
from fedmerge.lookup.loading import load_named
from fedmerge.lookup.typed_options import typed_options

__all__ = [
    "Entry",
    "build",
    "checked_options",
    "entries",
    "entry",
    "find",
    "own_kind",
    "register",
    "registered",
    "usual_names",
]

Registered = TypeVar("Registered", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """A registered class or function: its name, its paper, and what its docstring and parameters say."""

    name: str
    kind: str
    paper: str
    cls: Any
    alone: str = ""
    """What people call plain averaging that is followed by it, as ``fedadam`` is ``fedavg+server_adam``."""

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.cls) or "").partition("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """Options with their defaults; one that has to be given has ``inspect.Parameter.empty``."""
        if dataclasses.is_dataclass(self.cls):
            return {field.name: _default(field) for field in dataclasses.fields(self.cls) if field.init}
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(self.cls).parameters.values()
        filled_in = KINDS[self.kind].given
        return {
            parameter.name: parameter.default
            for parameter in parameters
            if parameter.kind in named and parameter.name not in filled_in
        }


_ENTRIES: dict[tuple[str, str], Entry] = {}


def register(name: str, *, kind: str = "", paper: str = "", alone: str = "") -> Callable[[Registered], Registered]:
    """Register a class or function under `name`.

    Parameters
    ----------
    name
        Lower case, as people will type it.
    kind
        A name of :data:`~fedmerge.lookup.kinds.KINDS`; by default the ``kind`` that the class has from its base class.
    paper
        Where it comes from, such as ``"arXiv:1602.05629"``.
    alone
        For a server step, the usual name of plain averaging that is followed by it, such as ``"fedadam"``.

    Raises
    ------
    FedMergeError
        It is no frozen dataclass, where the kind wants one; its kind is not known; or the name is taken.
    """

    def decorate(made: Registered) -> Registered:
        called = getattr(made, "__qualname__", repr(made))
        own = getattr(made, "kind", "")
        known = KINDS.get(kind or own)
        if not callable(made) or known is None or own not in ("", known.name):
            wanted = f"a class or function of kind {kind!r}" if kind in KINDS else f"a kind of {', '.join(KINDS)}"
            raise FedMergeError(f"{called}: to register {name!r} takes {wanted}")
        if known.frozen and not _is_frozen(made):
            raise FedMergeError(f"{called}: put @dataclass(frozen=True) below @register({name!r})")
        for other in known.named_with:
            taken = _ENTRIES.get((other, name))
            if taken is not None and _home(taken.cls) != _home(made):
                word = "method" if known.named_with[1:] else known.name
                raise FedMergeError(f"{word} name {name!r} is taken by {'.'.join(_home(taken.cls))}")
        _ENTRIES[known.name, name] = Entry(name, known.name, paper, made, alone)
        return made

    return decorate


def _home(made: Any) -> tuple[str, str]:
    return made.__module__, getattr(made, "__qualname__", "")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


@functools.cache
def _discover(kind: str) -> None:
    """Import what registers parts of one kind: its own folder, then what other installed packages announce."""
    for other in KINDS[kind].named_with:  # whose names are taken before anybody else may ask for them
        for home in KINDS[other].homes:
            package = importlib.import_module(home)
            for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
                importlib.import_module(f"{home}.{module.name}")
    load_entry_points(KINDS[kind], _announced, _ENTRIES, _forget)


def _announced(kind: Kind, name: str, made: Any) -> None:
    """Register what an entry point names, unless a decorator has done so while it was imported."""
    known = (entry.cls for (other, _), entry in _ENTRIES.items() if other == kind.name)
    if not inspect.ismodule(made) and not any(module is made for module in known):
        register(name, kind=kind.name)(made)


def _forget(before: Mapping[Any, Any]) -> None:
    """Drop what is registered since, but for fedmerge's own, which is not imported a second time."""
    for key, part in list(_ENTRIES.items()):
        if key not in before and _home(part.cls)[0].partition(".")[0] != "fedmerge":
            del _ENTRIES[key]


def entries(kind: str) -> Mapping[str, Entry]:
    """Everything registered of one kind, by name: ``"aggregator"``, ``"model"``, ``"observer"`` ...; see
    :data:`~fedmerge.lookup.kinds.KINDS`.
    """
    for other in KINDS[kind].named_with:
        _discover(other)
    return {name: part for (other, name), part in sorted(_ENTRIES.items()) if other == kind}


def registered(kind: str, name: str) -> Entry | None:
    """What is registered under a name, or None: nothing that the name alone asks for is imported.

    Examples
    --------
    >>> registered("statistic", "os:getcwd") is None
    True
    """
    for other in KINDS[kind].named_with:
        _discover(other)
    return _ENTRIES.get((kind, name))


def usual_names() -> Mapping[str, str]:
    """Server steps by the name that plain averaging has which is followed by them.

    Examples
    --------
    >>> usual_names()["fedavgm"]
    'server_momentum'
    """
    return {step.alone: name for name, step in entries("server step").items() if step.alone}


def entry(kind: str, name: str) -> Entry:
    """One registered class or function, or one of the user's own, ``module:name``, which is imported.

    Some kinds have none of the user's own, see :class:`~fedmerge.lookup.kinds.Kind`.

    Raises
    ------
    UnknownName
        Nothing of that name and kind is registered.
    ConfigError
        ``module:name`` cannot be imported, or is nothing that can be called.
    """
    if ":" in name and KINDS[kind].own:
        return _own(kind, name)
    part = registered(kind, name)
    if part is not None:
        return part
    known = entries(kind)
    if kind == "aggregator":
        remedy = _how_to_write(name)
        raise UnknownName("method", name, () if remedy else [*known, *usual_names()], remedy)
    module, _, last = name.rpartition(".")
    yours = f"Your own goes by 'module:name'{f', such as {module}:{last}' if module else ''}."
    raise UnknownName(kind, name, known, yours if KINDS[kind].own else "")


def _own(kind: str, name: str) -> Entry:
    made = load_named(name, kind, "name", f"my_module:my_{kind.replace(' ', '_')}", ConfigError)
    if not callable(made):
        raise ConfigError(f"{kind} {name!r} is a {type(made).__name__}: name a class or a function")
    if KINDS[kind].frozen and not _is_frozen(made):
        raise ConfigError(f"{kind} {name!r}: its fields are its options: make it a @dataclass(frozen=True)")
    return Entry(name, kind, "", made)


def _is_frozen(made: Any) -> bool:
    params = getattr(made, "__dataclass_params__", None)
    return params is not None and bool(params.frozen)


def find(name: str) -> Entry:
    """A method, or a part of one, by its name; plain averaging with a server step also by its usual name.

    Raises
    ------
    UnknownName
        Nothing of that name is registered.

    Examples
    --------
    >>> find("ridge_head").kind, find("fedadam").name
    ('refinement', 'server_adam')
    """
    plain = usual_names().get(name, name.strip("+"))
    for kind in METHOD_KINDS[2:] + METHOD_KINDS[:1]:
        part = registered(kind, plain)
        if part is not None:
            return part
    return entry((":" in plain and own_kind(plain)) or "aggregator", plain)


def own_kind(name: str) -> str:
    """The kind of a part of the user's own, ``module:name``, which is imported; empty where it says none.

    Raises
    ------
    ConfigError
        It cannot be imported, or the module's name is a method's, whose options stand elsewhere.

    Examples
    --------
    >>> own_kind("fedmerge.edits:Trim")
    'edit'
    """
    module = name.partition(":")[0]
    if module in entries("aggregator"):
        raise ConfigError(f"method {name!r}: options stand in parentheses: {module}(option=value)")
    kind = getattr(load_named(name, "method", "part", "my_module:MyPart", ConfigError), "kind", "")
    return kind if isinstance(kind, str) else ""


def _how_to_write(name: str) -> str:
    """What to write instead, where `name` is something else than a method that is misspelt."""
    if name in entries("edit"):
        return f"{name!r} goes in front of a method: {name}+fedavg."
    if any(name in entries(kind) for kind in METHOD_KINDS[2:]):
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
        Nothing of that name, or no such option of it.
    InvalidOption
        An option of the wrong type or outside its range.

    Examples
    --------
    >>> build("aggregator", "fedatt", {"step_size": "1.0"}).step_size
    1.0
    """
    part = entry(kind, name)
    return part.cls(**checked_options(part, options))


def checked_options(part: Entry, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the parameters' types want them.

    Raises
    ------
    UnknownName
        It has no such option.
    InvalidOption
        One of the wrong type, or one that is needed and not given.
    """
    return typed_options(part.name, part.cls, part.options, options)
