"""What a model is asked to do: the likelihood behind its loss, by which it is trained, judged and measured."""

from fedmerge.tasks.classification import Classification
from fedmerge.tasks.task import Estimator, Task

__all__ = ["Classification", "Estimator", "Task"]
