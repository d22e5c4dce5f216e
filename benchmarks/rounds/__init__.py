"""Speed and memory of simulated rounds, against plain PyTorch doing the same arithmetic in the same run.

Everything is FedAvg with plain SGD: only how clients are trained and averaged differs between systems.
"""

from benchmarks.rounds.interleave import Measured, measure
from benchmarks.rounds.report import Row, rows, speed_table
from benchmarks.rounds.task import Task
from benchmarks.rounds.workloads import WORKLOADS, Workload, find_workload

__all__ = ["WORKLOADS", "Measured", "Row", "Task", "Workload", "find_workload", "measure", "rows", "speed_table"]
