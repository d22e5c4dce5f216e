"""Observers: whoever watches a run, and may end it early. One file each."""

from fedmerge.observers.early_stopping import EarlyStopping
from fedmerge.observers.mlflow import MLflow
from fedmerge.observers.observer import Ending, Observer, Run, numbers_in
from fedmerge.observers.tensorboard import TensorBoard
from fedmerge.observers.watch import Calling, ObserverLike, RunStopped, Watch, make_observers

__all__ = [
    "Calling",
    "EarlyStopping",
    "Ending",
    "MLflow",
    "Observer",
    "ObserverLike",
    "Run",
    "RunStopped",
    "TensorBoard",
    "Watch",
    "make_observers",
    "numbers_in",
]
