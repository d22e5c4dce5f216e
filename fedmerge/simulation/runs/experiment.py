"""One seed of a configuration: its data, clients, model and strategies, the same in every setting."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedmerge.data import Dataset, Partition
from fedmerge.data.table import is_table
from fedmerge.errors import ConfigError
from fedmerge.inputs import changed
from fedmerge.merging import build_pipeline, main_part
from fedmerge.models.pretrained import is_base_file
from fedmerge.seeding import integer_seed
from fedmerge.simulation.runs.client_sources import DataFn, DataSource
from fedmerge.simulation.runs.config_model import Config
from fedmerge.simulation.runs.fitting import check_fit
from fedmerge.simulation.runs.linearised_checks import check_differentiable, linearised_by
from fedmerge.simulation.runs.model_fns import ModelFn, OwnModelFn
from fedmerge.simulation.runs.own_strategy import make_strategy
from fedmerge.simulation.runs.personal_checks import check_personal_parts
from fedmerge.simulation.scenarios.faults import Mishaps
from fedmerge.simulation.scenarios.hostile_clients import Hostile, HostileDataFn, chosen_attackers
from fedmerge.strategies import MergeStrategy, RunSettings, client_app, to_arrays
from fedmerge.strategies.policies import RoundPolicies
from fedmerge.tasks import AnyLoss, Regression, Task

__all__ = ["Experiment"]


@dataclass(frozen=True)
class Experiment:
    """Everything that the methods of a comparison share for one seed.

    Parameters
    ----------
    config
        The configuration.
    seed
        Root of partition, initialisation, sampling and batches.
    linearised
        Patterns of the parameters in which the model is linearised, where a method has it so; see :meth:`of_method`.

    Raises
    ------
    DataError, PartitionError, ModelError, UnknownName
        From its properties, where the configuration asks for what cannot be had.
    """

    config: Config
    seed: int
    linearised: tuple[str, ...] = ()

    def of_method(self, method: str) -> Experiment:
        """The experiment as it is for one method, whose clients may train the model's linearisation."""
        return replace(self, linearised=linearised_by(self.config, method))

    @property
    def _source(self) -> DataSource:
        data, base = self.config.data, self.config.model.pretrained
        file = base if base is not None and data.withhold and is_base_file(base) else ""
        options, division = json.dumps(self._data_options), self.config.partition
        return DataSource(data.name, data.dir, options, division, self.seed, file, data.domains)

    @property
    def _data_options(self) -> dict[str, Any]:
        """What the data set is loaded with; of a table's whole numbers the task says whether they are classes."""
        data, options = self.config.data, self.config.data.every_option
        if "task" in options or not (data.name == "table" or is_table(data.name)):
            return options
        task = self.config.task.made()
        numbers = isinstance(task, Regression) or (isinstance(task, AnyLoss) and task.elementwise)
        return {**options, "task": "regression"} if numbers else options

    @property
    def dataset(self) -> Dataset:
        """The data set, loaded once in a process; its test set is what the server does not hold.

        Raises
        ------
        ConfigError
            The server would hold the whole test set.
        """
        whole, held = self.whole_dataset, self.config.server_examples
        if held >= len(whole.test):
            raise ConfigError(f"server_examples is {held} of {len(whole.test)} in the test set: leave some to test on")
        return whole.tested_on(whole.test.subset(torch.arange(held, len(whole.test)))) if held else whole

    @property
    def whole_dataset(self) -> Dataset:
        """The data set with all of its test examples, those that the server holds too."""
        return self._source.dataset

    @property
    def _server_data(self) -> list[tuple[Any, Tensor]] | None:
        held = self.config.server_examples
        return list(self.whole_dataset.test.subset(torch.arange(held)).in_order(256)) if held else None

    @property
    def partition(self) -> Partition:
        """Who holds which training examples."""
        return self._source.partition

    @property
    def num_clients(self) -> int:
        """Clients in the federation."""
        return len(self.partition.train)

    @property
    def task(self) -> Task | None:
        """What the model is asked to do: as the configuration says, or the data set; None for plain classification."""
        return self.config.task.made(self.dataset.task)

    @property
    def model_fn(self) -> ModelFn:
        """Makes the initial model, the same every time."""
        model, data, task = self.config.model, self.dataset, self.task
        return ModelFn(
            model.name,
            data.input_shape,
            data.outputs if task is None else task.outputs_for(data.example[1], data.outputs),
            integer_seed(self.seed, "initialisation"),
            json.dumps(model.options),
            model.frozen,
            model.base,
            model.adapters,
            self.linearised or tuple(self.config.training.linearised),
        )

    def check_model(self) -> None:
        """Make sure that the model takes the data, before anything runs.

        Raises
        ------
        ModelError
            It cannot be built, or does not, or gives something else than a score per class.
        ConfigError
            Parts of it are personal, and no client holds examples by which its own model could be judged.
        UnknownName
            A pattern of what is frozen or personal is the name of no tensor.
        """
        data = self.dataset
        where = f"model {self.config.model.name!r} on data set {data.name!r}"
        check_fit(self.model_fn, *data.example, data.outputs, where, self.task)
        check_differentiable(self.model_fn, data.example[0], self.task)
        check_personal_parts(self.model_fn(), self.config.personal, self.partition.held_out)

    def client_app(self) -> ClientApp:
        """The client side, small to pickle: workers make their data from the settings."""
        model, adapters = self.config.model, self.config.model.adapters
        data_fn, hostile = DataFn(self._source), self.hostile
        own = OwnModelFn(self.model_fn, tuple(json.dumps(v) for v in model.variants), self.seed)
        return client_app(
            self.model_fn,
            data_fn if hostile is None else HostileDataFn(data_fn, hostile),
            training=replace(self.config.local_training, linearised=self.model_fn.linearised),
            device=self.config.device,
            own_model_fn=own if model.apart or model.variants else None,
            tamper=hostile,
            mishaps=self.mishaps,
            noise_seed=self.seed,
            task=self.task,
            personal=self.config.personal,
            own_ranks=None if adapters is None or not adapters.ranks.differ else adapters.ranks,
        )

    @property
    def mishaps(self) -> Mishaps | None:
        """What befalls clients, where the configuration has faults."""
        faults = self.config.faults
        return None if faults is None else Mishaps(faults, self.seed)

    @property
    def hostile(self) -> Hostile | None:
        """The clients that attack, where the configuration has any."""
        settings = self.config.attack
        if settings is None:
            return None
        attackers = chosen_attackers(self.seed, self.num_clients, settings.share)
        return Hostile(settings.attack, attackers, self.dataset.num_classes, self.seed)

    def initial_arrays(self) -> ArrayRecord:
        """The initial global model."""
        return to_arrays(self.model_fn().state_dict())

    def strategy(self, method: str) -> Strategy:
        """The server side for one method.

        Raises
        ------
        ConfigError
            A ``module:Strategy`` that cannot be imported or made; or a round asks fewer clients than ``min_clients``.
        """
        asked = max(int(self.num_clients * self.config.fraction_train), 1)
        if asked < self.config.min_clients:
            raise ConfigError(
                f"min_clients = {self.config.min_clients}, and a round asks {asked} of {self.num_clients} clients "
                f"(fraction_train = {self.config.fraction_train:g}): lower the one or raise the other"
            )
        held_out = self.config.evaluate_clients and any(len(rows) for rows in self.partition.held_out)
        flower: dict[str, Any] = {
            "fraction_train": self.config.fraction_train,
            "fraction_evaluate": self.config.fraction_train if held_out else 0.0,
            "min_train_nodes": 1,
            "min_evaluate_nodes": 1,
            "min_available_nodes": self.num_clients,
        }
        if ":" in main_part(method).name:
            return make_strategy(method, flower, self.run_settings, self.config.options)
        pipeline = build_pipeline(method, self.config.options, privacy=self.config.privacy, trust=self.config.trust)
        strategy = MergeStrategy(pipeline, **flower)
        strategy.adopt(self.run_settings)
        return strategy

    @property
    def run_settings(self) -> RunSettings:
        """What the configuration asks of a strategy of ours."""
        config = self.config
        return RunSettings(
            seed=self.seed,
            policies=RoundPolicies(config.on_client_error, config.on_too_few, config.round_timeout),
            batch_norm=config.batch_norm,
            on_bad_update=config.on_bad_update,
            min_clients=config.min_clients,
            statistics=config.statistics,
            privacy=config.privacy,
            trust=config.trust,
            model_fn=self.model_fn,
            # The test set's first inputs show the model's shapes; their values tell nothing.
            example=changed(self.dataset.example[0], torch.zeros_like),
            data=self._server_data,
            task=self.task,
            personal=config.personal,
            frozen_mode=config.training.frozen_mode,
            send_frozen="never",  # all clients are ours
        )
