"""What a model is asked to do: the likelihood behind its loss, by which it is trained, judged and measured."""

from fedmerge.tasks.any_loss import AnyLoss, Loss
from fedmerge.tasks.binary import Binary
from fedmerge.tasks.classification import Classification
from fedmerge.tasks.given import TaskLike, either, make_task, task_of
from fedmerge.tasks.language_model import LanguageModel
from fedmerge.tasks.metric import Decisions, Metric, OwnMetric
from fedmerge.tasks.metrics import AUROC, F1, MAE, R2, RMSE, IoU, Perplexity
from fedmerge.tasks.multilabel import Multilabel
from fedmerge.tasks.one_hot_squares import OneHotSquares
from fedmerge.tasks.reading import Reading, TaskAt, called_as_told, outputs_like, read_task, reading_of
from fedmerge.tasks.regression import Regression
from fedmerge.tasks.task import Estimator, Task, as_batch

__all__ = [
    "AUROC",
    "F1",
    "MAE",
    "R2",
    "RMSE",
    "AnyLoss",
    "Binary",
    "Classification",
    "Decisions",
    "Estimator",
    "IoU",
    "LanguageModel",
    "Loss",
    "Metric",
    "Multilabel",
    "OneHotSquares",
    "OwnMetric",
    "Perplexity",
    "Reading",
    "Regression",
    "Task",
    "TaskAt",
    "TaskLike",
    "as_batch",
    "called_as_told",
    "either",
    "make_task",
    "outputs_like",
    "read_task",
    "reading_of",
    "task_of",
]
