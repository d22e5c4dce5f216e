"""Figures and tables drawn from run records and from what diagnostics found: nothing of training.

Importing this package does not import matplotlib; the `plot_*` functions do, when they are called.
"""

from __future__ import annotations

from fedmerge.plotting.barrier import plot_barrier, plot_matching
from fedmerge.plotting.changes import plot_costs, plot_similarity
from fedmerge.plotting.class_shares import plot_partition
from fedmerge.plotting.convergence import plot_convergence
from fedmerge.plotting.hostile_grid import plot_hostile
from fedmerge.plotting.permutation_graph import plot_permutations
from fedmerge.plotting.runs import Run, read_runs
from fedmerge.plotting.summary import summarise, summarise_references, write_summary
from fedmerge.plotting.traffic import plot_traffic

__all__ = [
    "Run",
    "plot_barrier",
    "plot_convergence",
    "plot_costs",
    "plot_hostile",
    "plot_matching",
    "plot_partition",
    "plot_permutations",
    "plot_similarity",
    "plot_traffic",
    "read_runs",
    "summarise",
    "summarise_references",
    "write_summary",
]
