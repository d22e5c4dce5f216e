"""Modules under the names that they had before 0.2: scripts and methods of users import from them."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "install", "moved_name"]

MOVED = {
    "aggregators.base": ("aggregators.aggregator", "lookup.option_checks"),
    "barriers": ("diagnostics.barriers",),
    "buffers": ("merging.buffers", "layout"),
    "checks.outliers": ("checks.magnitudes",),
    "clients.train_group": ("clients.road",),
    "checkpoints": ("records.checkpoints",),
    "data.examples": ("data.example_sets",),
    "loading": ("lookup.loading",),
    "merge_files": ("offline.merge_files",),
    "merging.agreement": ("merging.statistics_reader",),
    "merging.bounds": ("checks.magnitudes",),
    "merging.completion": ("merging.pipeline",),
    "merging.complex_check": ("merging.chain",),
    "merging.passed": ("merging.refined_merge",),
    "method_names": ("lookup.method_names",),
    "model_files": ("offline.model_files",),
    "observers.base": ("observers.observer",),
    "pipeline": ("merging",),
    "models.copies": ("models.resize",),
    "refine.base": ("refine.refinement",),
    "repair": ("merging.repair",),
    "simulation.attacks": ("simulation.scenarios.attacks",),
    "simulation.config": ("simulation.runs.config", "simulation.runs.config_model"),
    "simulation.faults": ("simulation.scenarios.faults",),
    "simulation.grid": ("simulation.grids.simulation_grid",),
    "simulation.numbered_grid": ("simulation.grids.numbered_grid",),
    "statistics.base": ("statistics.statistic_type", "statistics.layer_statistic"),
    "statistics.compression": ("statistics.sending.compression",),
    "statistics.settings": ("statistics.sending.settings",),
    "strategies.question_messages": ("strategies.reach",),
    "strategies.stage_messages": ("strategies.reach",),
    "strategies.wire": ("wire.flower_records", "wire.record_values", "wire.keys"),
    "tasks.class_axis": ("tasks.label_shapes", "training.local"),
    "tasks.called": ("tasks.reading",),
    "training.model_snapshot": ("training.model_on_data",),
    "training.rules.base": ("training.rules.local_rule",),
    "validation": ("checks.validation",),
    "weights": ("statistics.measuring.weight_matrices",),
    "widths": ("matching.widths",),
}
"""By old name, the modules in which its names stand now; all below ``fedmerge``."""

_NAMES = {"fedmerge.statistics": {"compute_statistics": "api"}}
"""By package, names that stood there and stand elsewhere now."""


class _Moved(MetaPathFinder, Loader):
    """Finds a module by its old name, and warns whoever asks for it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "fedmerge" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.partition(".")[2]
        homes = [f"fedmerge.{home}" for home in MOVED[old]]
        warnings.warn(
            f"fedmerge.{old} is {' and '.join(homes)} now, and the old name will go: import from there",
            DeprecationWarning,
            stacklevel=2,
        )
        for home in reversed(homes):
            moved = importlib.import_module(home)
            vars(module).update({name: value for name, value in vars(moved).items() if not name.startswith("__")})


def moved_name(package: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package from which names have moved.

    Examples
    --------
    >>> moved_name("fedmerge.statistics")("compute_statistics").__module__
    'fedmerge.offline.compute'
    """

    def find(name: str) -> Any:
        home = _NAMES[package].get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"fedmerge.{home}"), name)

    return find


def install() -> None:
    """Have Python ask for moved modules, after all others, so that nothing that exists is hidden."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
