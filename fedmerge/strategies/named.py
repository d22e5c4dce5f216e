"""One Flower strategy per method, under the name of the method's class: ``FedNova``, ``Rebasin``, ``RegMean`` ...

They are made from the registry when they are asked for, so that a new method has one as soon as its file is there.
``named.pyi`` lists them for type checkers. Names that are Flower's, such as ``FedProx``, stand in
:mod:`fedmerge.strategies.flower_names` with Flower's options.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

from fedmerge.registry import Entry, entries
from fedmerge.strategies import flower_names
from fedmerge.strategies.merge_strategy import MergeStrategy

__all__ = ["Named", "strategy_methods"]


class Named(MergeStrategy):
    """A strategy of one method; its options are keywords."""

    method: ClassVar[str]
    reads_messages = False

    def __init__(self, **keywords: Any) -> None:
        super().__init__(self.method, **keywords)


@cache
def strategy_methods() -> Mapping[str, str]:
    """The method of each strategy that is made here, by the strategy's name.

    Examples
    --------
    >>> strategy_methods()["FedNova"], "FedProx" in strategy_methods()
    ('fednova', False)
    """
    methods: dict[str, str] = {}
    for name, found in entries("aggregator").items():
        methods.setdefault(found.cls.__name__, name)
    return {called: name for called, name in methods.items() if called not in flower_names.__all__}


@cache
def _strategy(name: str) -> type[Named]:
    found = entries("aggregator")[strategy_methods()[name]]
    # Pickles name a class by its module, where __getattr__ below makes the same one.
    facts = {"__module__": __name__, "__doc__": _doc(name, found), "method": found.name, "reads_messages": False}
    return type(name, (Named,), facts)


def _doc(name: str, found: Entry) -> str:
    home = f"{found.cls.__module__}.{found.cls.__qualname__}"
    lines = [f":class:`MergeStrategy` with :class:`{home}`; its options are keywords too.", "", found.summary]
    if getattr(found.cls, "requires_model", False) is True:
        lines += ["", "It has to trace the model: pass `model_fn` and `example`."]
    if inspect.Parameter.empty not in found.options.values():
        example = f">>> {name}(fraction_train=0.5).pipeline.aggregator"
        lines += ["", "Examples", "--------", example, repr(found.cls())]
    return "\n".join(lines)


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name not in strategy_methods():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _strategy(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *strategy_methods()})


def stub() -> str:
    """The text of ``named.pyi``, which a test holds against it."""
    head = (__doc__ or "").partition("\n")[0]
    classes = "\n".join(f"class {name}(Named): ..." for name in sorted(strategy_methods()))
    return f'''"""{head}"""

from collections.abc import Mapping
from typing import Any, ClassVar

from fedmerge.strategies.merge_strategy import MergeStrategy

class Named(MergeStrategy):
    method: ClassVar[str]
    def __init__(self, **keywords: Any) -> None: ...

def strategy_methods() -> Mapping[str, str]: ...
def stub() -> str: ...

{classes}

def __getattr__(name: str) -> type[Named]: ...  # methods of other packages, and those that came later
'''
