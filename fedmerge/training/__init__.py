"""Local training of clients."""

from fedmerge.training.cohort import Participant, TrainedCohort, train_cohort
from fedmerge.training.correction import Correction
from fedmerge.training.engine import EngineChoice, choose_engine
from fedmerge.training.judged import Judged, evaluate, judge
from fedmerge.training.local import batches, train
from fedmerge.training.local_training import LocalTraining
from fedmerge.training.one_by_one import train_one_by_one
from fedmerge.training.own_training import RoundBatches
from fedmerge.training.report import TrainingReport

__all__ = [
    "Correction",
    "EngineChoice",
    "Judged",
    "LocalTraining",
    "Participant",
    "RoundBatches",
    "TrainedCohort",
    "TrainingReport",
    "batches",
    "choose_engine",
    "evaluate",
    "judge",
    "train",
    "train_cohort",
    "train_one_by_one",
]
