"""What a model is asked to do: the likelihood behind its loss, by which it is trained, judged and measured."""

from fedmerge.tasks.any_loss import AnyLoss, Loss
from fedmerge.tasks.binary import Binary
from fedmerge.tasks.classification import Classification
from fedmerge.tasks.given import TaskLike, either, task_of
from fedmerge.tasks.reading import Reading, TaskAt, outputs_like, read_task, reading_of
from fedmerge.tasks.regression import Regression
from fedmerge.tasks.task import Estimator, Task, as_batch

__all__ = [
    "AnyLoss",
    "Binary",
    "Classification",
    "Estimator",
    "Loss",
    "Reading",
    "Regression",
    "Task",
    "TaskAt",
    "TaskLike",
    "as_batch",
    "either",
    "outputs_like",
    "read_task",
    "reading_of",
    "task_of",
]
