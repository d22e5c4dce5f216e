"""Makers of models, which travel to workers as settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from torch import nn

from fedmerge.adapters import Adapters
from fedmerge.layout import freeze
from fedmerge.models import build_model
from fedmerge.models.pretrained import Pretrained
from fedmerge.models.tangent import linearise
from fedmerge.seeding import integer_seed

__all__ = ["ModelFn", "OwnModelFn"]


@dataclass(frozen=True)
class ModelFn:
    """Makes the initial model."""

    name: str
    input_shape: tuple[int, ...]
    num_classes: int
    seed: int
    options: str
    frozen: tuple[str, ...] = ()
    pretrained: Pretrained | None = None
    adapters: Adapters | None = None
    linearised: tuple[str, ...] = ()

    def __call__(self) -> nn.Module:
        """A new one, always the same."""
        options = json.loads(self.options)
        model = build_model(self.name, self.input_shape, self.num_classes, seed=self.seed, **options)
        if self.pretrained is not None:
            self.pretrained.put_into(model, self.input_shape, self.num_classes)
        if self.adapters is not None:
            model = self.adapters.put_into(model, self.seed)
        model = freeze(model, self.frozen)
        return linearise(model, self.linearised) if self.linearised else model


@dataclass(frozen=True)
class OwnModelFn:
    """Makes what a client starts from where clients start apart."""

    common: ModelFn
    variants: tuple[str, ...]
    seed: int

    def __call__(self, partition_id: int) -> nn.Module:
        """The model of one client."""
        options = json.loads(self.common.options)
        if self.variants:
            options |= json.loads(self.variants[partition_id % len(self.variants)])
        seed = integer_seed(self.seed, "own initialisation", partition_id)
        return replace(self.common, seed=seed, options=json.dumps(options))()
