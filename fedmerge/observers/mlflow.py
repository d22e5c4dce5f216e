"""Runs in MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedmerge.observers.observer import Ending, Observer, Row, Run, numbers_in
from fedmerge.observers.tracker_library import need
from fedmerge.records.run_records import comparable
from fedmerge.registry import register

__all__ = ["MLflow"]


@register("mlflow")
@dataclass
class MLflow(Observer):
    """Log configuration, rows and ending of each run to MLflow; a resumed run goes on under its number.

    Wants ``pip install "fedmerge[mlflow]"``, or else a MissingExtra is raised. The experiment is made where it does not
    exist; `tracking_uri` is a server's URL or a folder, and by default what MLflow's own settings say.
    """

    experiment: str = "fedmerge"
    tracking_uri: str | None = None
    _library: Any = field(default=None, init=False, repr=False)
    _client: Any = field(default=None, init=False, repr=False)
    _id: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        self._library = need("mlflow", "mlflow")

    def began(self, run: Run) -> None:
        """Find the run's entry where it goes on, or make one."""
        client = self._client = self._library.MlflowClient(tracking_uri=self.tracking_uri)
        known, tag = client.get_experiment_by_name(self.experiment), str(run.final and run.final.absolute())
        where = known.experiment_id if known else client.create_experiment(self.experiment)
        before = client.search_runs([where], f"tags.folder = '{tag}'", max_results=1) if run.rows else []
        self._id = (before or [client.create_run(where, tags={"folder": tag}, run_name=run.name)])[0].info.run_id
        client.update_run(self._id, status="RUNNING")
        for name, value in {} if before else comparable(run.config).items():
            client.log_param(self._id, name, str(value)[:500])  # which every version takes

    def round_done(self, row: Row, state: Mapping[str, Tensor]) -> None:
        """Log the row's numbers."""
        for name, number in numbers_in(row).items():
            self._client.log_metric(self._id, name, number, step=row["round"])

    def ended(self, ending: Ending) -> None:
        """Say how it ended."""
        self._client.set_tag(self._id, "stopped", ending.stopped or "")
        self._client.set_terminated(self._id, "FINISHED" if ending.error is None else "FAILED")
