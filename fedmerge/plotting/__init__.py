"""Figures and tables drawn from run records: files in, files out, nothing of training.

Importing this package does not import matplotlib; the two `plot_*` functions do, when they are called.
"""

from __future__ import annotations

from fedmerge.plotting.convergence import plot_convergence
from fedmerge.plotting.partition import plot_partition
from fedmerge.plotting.runs import Run, read_runs
from fedmerge.plotting.summary import summarise, write_summary

__all__ = ["Run", "plot_convergence", "plot_partition", "read_runs", "summarise", "write_summary"]
