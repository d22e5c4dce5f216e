"""Small models, clients and ways to compare, the same bits on every device: made on the CPU and moved."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.seeding import torch_generator
from fedmerge.training import LocalTraining, train

CLASSES, SIDE, EXAMPLES, CLIENTS = 3, 6, 24, 3
SETTINGS = LocalTraining(learning_rate=0.05, momentum=0.9, epochs=2, batch_size=8)
CPU = torch.device("cpu")

Batches = list[tuple[Tensor, Tensor]]


def mlp() -> nn.Module:
    """Two hidden layers."""
    hidden = (nn.Linear(SIDE * SIDE, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(7, CLASSES))


def cnn() -> nn.Module:
    """Convolutions, one of them with batch norm, pooling and a head."""
    first = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*first, *second, nn.Linear(5, CLASSES))


def dropout_mlp() -> nn.Module:
    """Dropout draws from the device's own generator: the same only on the same device."""
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES))


ARCHITECTURES: Mapping[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn}


def moved(value: Any, device: torch.device) -> Any:
    """A copy of tensors, modules and what holds them, on a device."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(device)
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: moved(item, device) for name, item in value.items()}
    return type(value)(moved(item, device) for item in value)


@dataclass(frozen=True, eq=False)
class Federation:
    """Clients on one device: where they began, what each trained, and its batches."""

    base: nn.Module
    models: list[nn.Module]
    batches: list[Batches]

    def to(self, device: torch.device) -> Federation:
        """The same clients on another device."""
        return Federation(moved(self.base, device), moved(self.models, device), moved(self.batches, device))


@cache
def federation(architecture: str) -> Federation:
    """Three clients on the CPU that trained on labels of their own."""
    base = seeded(ARCHITECTURES[architecture])
    batches = [examples(client) for client in range(CLIENTS)]
    models = []
    for client, (x, y) in enumerate(batches):
        models.append(copy.deepcopy(base))
        train(models[-1], x, y, SETTINGS, seed=0, client=client, round=1)
    return Federation(base, models, [list(zip(x.split(8), y.split(8), strict=True)) for x, y in batches])


def seeded(model_fn: Callable[[], nn.Module]) -> nn.Module:
    """A model whose weights are the same wherever it is made."""
    model, draw = model_fn(), torch_generator(0, "gpu check model")
    with torch.no_grad():
        for tensor in model.parameters():
            spread = 0.4 if tensor.ndim > 1 else 0.05
            centre = 1.0 if tensor.ndim == 1 and float(tensor.min()) == 1.0 else 0.0  # the weight of a norm
            tensor.copy_(centre + spread * torch.randn(tensor.shape, generator=draw))
    return model


def examples(client: int, count: int = EXAMPLES) -> tuple[Tensor, Tensor]:
    """Images around a mean for each class, more of some classes than of others."""
    means = torch.randn(CLASSES, 1, SIDE, SIDE, generator=torch_generator(0, "gpu check means"))
    draw = torch_generator(0, "gpu check examples", client)
    shares = torch.ones(CLASSES)
    shares[client % CLASSES] = 4.0
    labels = torch.multinomial(shares, count, replacement=True, generator=draw)
    return means[labels] + 0.7 * torch.randn(count, 1, SIDE, SIDE, generator=draw), labels


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Detached copies of a model's tensors."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> float:
    """The largest distance of two tensors of one name, as a share of the norm of the one that is wanted."""
    if found.keys() != wanted.keys():
        raise AssertionError(f"names differ: {sorted(found.keys() ^ wanted.keys())}")
    worst = 0.0
    for name, one in wanted.items():
        if isinstance(one, Mapping):
            worst = max(worst, difference(found[name], one))
            continue
        a, b = found[name].detach().cpu().double(), one.detach().cpu().double()
        if a.shape != b.shape or found[name].dtype != one.dtype:
            raise AssertionError(f"{name}: {found[name].dtype} {list(a.shape)} for {one.dtype} {list(b.shape)}")
        apart, size = float((a - b).norm()), float(b.norm())
        if not math.isfinite(apart):
            raise AssertionError(f"{name} is not finite")
        worst = max(worst, apart / size if size > 1e-12 else apart)
    return worst


def must_lie(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Refuse tensors that have left the device they belong to."""
    astray = [name for name, tensor in tensors.items() if tensor.device.type != device.type]
    if astray:
        raise AssertionError(f"not on {device}: {', '.join(astray[:3])}")
