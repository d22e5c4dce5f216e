"""The experiment that both sides of the app read off the run configuration."""

from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import UserConfig
from flwr.clientapp import ClientApp

from fedmerge.simulation import Experiment, load_config, make_config


def experiment(run_config: UserConfig) -> Experiment:
    """The experiment of this run, made once in a process."""
    return _experiment(str(run_config["config"]), int(run_config["seed"]))


def experiment_client_app(run_config: UserConfig) -> ClientApp:
    """The experiment's client side, made once in a process."""
    return _client_app(str(run_config["config"]), int(run_config["seed"]))


@lru_cache(maxsize=1)
def _client_app(path: str, seed: int) -> ClientApp:
    return _experiment(path, seed).client_app()


@lru_cache(maxsize=1)
def _experiment(path: str, seed: int) -> Experiment:
    config = make_config(load_config(Path(path)) if path else {})
    torch.set_num_threads(config.threads)
    return Experiment(config, seed)
