"""Figures and tables drawn from run records: files in, files out, nothing of training.

Importing this package does not import matplotlib; the `plot_*` functions do, when they are called.
"""

from __future__ import annotations

from fedmerge.plotting.convergence import plot_convergence
from fedmerge.plotting.partition import plot_partition
from fedmerge.plotting.runs import Run, read_runs
from fedmerge.plotting.summary import summarise, summarise_references, write_summary
from fedmerge.plotting.traffic import plot_traffic

__all__ = [
    "Run",
    "plot_convergence",
    "plot_partition",
    "plot_traffic",
    "read_runs",
    "summarise",
    "summarise_references",
    "write_summary",
]
