"""Training of one's own, a function or schedules, tried before anything is written."""

from __future__ import annotations

from dataclasses import replace
from traceback import extract_tb

import torch
from torch import Tensor

from fedmerge.errors import ConfigError, FedMergeError, InvalidOption
from fedmerge.merging import build_pipeline, main_part
from fedmerge.simulation.runs.experiment import Experiment
from fedmerge.training.correction import NO_CORRECTION
from fedmerge.training.local import train
from fedmerge.training.report import TrainingReport
from fedmerge.training.rules.local_rule import LocalRule

__all__ = ["check_own_training", "check_schedules"]


def check_schedules(experiment: Experiment) -> None:
    """Make sure that the schedules give every round, and every step of the largest client's first, its learning rate.

    Raises
    ------
    ConfigError
        One of one's own cannot be imported.
    InvalidOption
        It fails, or gives no positive factor.
    """
    settings, largest = experiment.config.local_training, max(map(len, experiment.partition.train))
    for round in range(1, experiment.config.rounds + 1):
        settings.in_round(round)
    settings.rates(settings.steps_of(largest))


def check_own_training(experiment: Experiment, method: str) -> None:
    """Make sure that ``training.train_fn`` tells and does what a method asks of it, by one batch of one client.

    The client with the most examples trains a model that is thrown away. Methods of other packages' strategies ask
    what nobody knows beforehand: for them the function has only to return a report.

    Raises
    ------
    ConfigError
        The function fails, returns no report, or leaves out the learning rate or the correction that the method needs.
    """
    settings = experiment.config.local_training
    if settings.train_fn is None:
        return
    ours = ":" not in main_part(method).name
    aggregator = build_pipeline(method, experiment.config.options).aggregator if ours else None
    rule = None if aggregator is None else aggregator.local_rule
    what = f"{method} with training.train_fn = {settings.train_fn!r}"
    try:
        report = _tried(experiment, rule)
        for statistic in () if aggregator is None else aggregator.needs:
            if statistic.among_metrics:  # read off the report; others are measured on the model
                statistic.measure(experiment.model_fn(), [], report)
    except InvalidOption as error:
        raise ConfigError(f"{what}: {error}; what the training function returns is what a client tells") from error
    except FedMergeError:
        raise
    except Exception as error:  # one's own code may raise anything
        place = extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{what} fails on a first batch: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        ) from error


def _tried(experiment: Experiment, rule: LocalRule | None) -> TrainingReport:
    """The report of one batch, or one a pass, trained with what a rule adds; its offsets are zero at first."""
    model, settings, sizes = experiment.model_fn(), experiment.config.local_training, experiment.partition.train
    client = max(range(len(sizes)), key=lambda number: len(sizes[number]))
    data = experiment.partition.client_data(experiment.dataset, client).train
    data = data.subset(torch.arange(min(len(data), settings.batch_size)))
    settings = replace(settings, linearised=experiment.model_fn.linearised, steps=settings.steps and 1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    correction = NO_CORRECTION if rule is None else rule.correction({}, {})
    if rule is not None and rule.keeps:  # from its second round on it corrects by what it has kept
        correction = replace(correction, offset={name: torch.zeros_like(p) for name, p in start.items()})
    report = train(
        model, data, None, settings,
        seed=experiment.seed, client=client, round=1, task=experiment.task, correction=correction,
    )  # fmt: skip
    if rule is not None and rule.keeps:
        moved: dict[str, Tensor] = {name: before - trained[name].detach() for name, before in start.items()}
        rule.keep(moved, {}, {}, report)
    return report
