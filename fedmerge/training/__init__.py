"""Local training of clients."""

from fedmerge.training.cohort import Participant, TrainedCohort, train_cohort
from fedmerge.training.local import LocalTraining, batches, evaluate, train
from fedmerge.training.report import TrainingReport

__all__ = [
    "LocalTraining",
    "Participant",
    "TrainedCohort",
    "TrainingReport",
    "batches",
    "evaluate",
    "train",
    "train_cohort",
]
