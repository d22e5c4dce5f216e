"""Local training of clients."""

from fedmerge.training.local import LocalTraining, batches, evaluate, train
from fedmerge.training.report import TrainingReport

__all__ = ["LocalTraining", "TrainingReport", "batches", "evaluate", "train"]
