"""Means and variances that a client's own data have at every batch norm of a model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge.state import State
from fedmerge.statistics.base import Batches, Statistic
from fedmerge.training.report import TrainingReport

__all__ = ["BatchNormMoments"]


@dataclass(frozen=True)
class BatchNormMoments(Statistic):
    """Running statistics of every batch norm, measured afresh: ``<layer>.running_mean`` and ``.running_var``.

    One pass in training mode with the cumulative average that stochastic weight averaging uses
    (arXiv 1803.05407). It is how the server recalibrates a merged model without data of its own. A model
    without batch norm has an empty value.
    """

    name: ClassVar[str] = "batch_norm"

    @torch.no_grad()
    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Measure on a copy, so that `model` keeps its statistics."""
        probe = copy.deepcopy(model).eval()
        layers = {
            name: layer
            for name, layer in probe.named_modules()
            if isinstance(layer, _BatchNorm) and layer.track_running_stats
        }
        if not layers:
            return {}
        for layer in layers.values():
            # Only the batch norms see training mode: dropout would disturb what they measure.
            layer.train()
            layer.reset_running_stats()
        seen = 0
        for inputs, _ in batches:
            if len(inputs) == 1 and seen:
                continue  # a single example has no variance
            seen += len(inputs)
            for layer in layers.values():
                layer.momentum = len(inputs) / seen  # the cumulative average over examples
            probe(inputs)
        moments: dict[str, torch.Tensor] = {}
        for name, layer in layers.items():
            if layer.running_mean is not None and layer.running_var is not None:
                moments[f"{name}.running_mean" if name else "running_mean"] = layer.running_mean
                moments[f"{name}.running_var" if name else "running_var"] = layer.running_var
        return moments
