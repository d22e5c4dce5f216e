"""REPAIR: every channel of a merged model brought to the mean and deviation that it has in the models merged."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.inputs import call

__all__ = ["Rescale"]

_FLOOR = 1e-5
_LOUDEST = 10.0  # times the median: models beyond it say nothing of how loud the merged one should be


class Rescale:
    """Collects the channels' means and deviations of aligned models, then corrects the merged one.

    Jordan et al. 2023 (arXiv 2211.08403): after each linear layer and convolution but the last, channel by channel,
    ``y' = (y - mean_merged) / std_merged * goal_std + goal_mean``, where goals are weighted means of the models'
    means and of their standard deviations (not variances); folded into weight and bias. Of three models or more, a
    layer ten times as loud as the median is left out of the goals. A layer without bias is
    only scaled. Layers are corrected from the input on, each seeing the corrected ones before it.

    Parameters
    ----------
    inputs
        Batches, read several times.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> x = torch.randn(50, 3)
    >>> rescale = Rescale([x])
    >>> rescale.add(model, 1.0)
    >>> torch.allclose(rescale.finish(model)["0.weight"], model[0].weight, atol=1e-5)
    True
    """

    def __init__(self, inputs: Iterable[Any]) -> None:
        self._inputs: Sequence[Any] = list(inputs)
        self._found: list[dict[str, tuple[Tensor, Tensor]]] = []
        self._weights: list[float] = []
        self._order: list[str] = []

    def add(self, model: nn.Module, weight: float) -> None:
        """One of the models that were merged, its channels in the merged model's order."""
        moments = _Moments(model)
        with moments:
            moments.run(self._inputs)
        self._found.append(moments.found())
        self._weights.append(weight)
        self._order = list(moments.sums)

    def _goal(self, name: str) -> tuple[Tensor, Tensor]:
        """Means of the models' means and deviations, without models whose layer is far louder than most."""
        sizes = [float((one[name][0].square().mean() + one[name][1].square().mean()).sqrt()) for one in self._found]
        finite = sorted(size for size in sizes if math.isfinite(size))
        most = _LOUDEST * finite[(len(finite) - 1) // 2] if len(sizes) > 2 and finite else math.inf
        taken = [i for i, size in enumerate(sizes) if size <= most and math.isfinite(size)] or [0]
        largest = max(self._weights[i] for i in taken)
        weights = [self._weights[i] / largest for i in taken]
        means = sum(w * self._found[i][name][0] for w, i in zip(weights, taken, strict=True))
        deviations = sum(w * self._found[i][name][1] for w, i in zip(weights, taken, strict=True))
        return torch.as_tensor(means) / sum(weights), torch.as_tensor(deviations) / sum(weights)

    def finish(self, model: nn.Module, frozen: Collection[str] = ()) -> dict[str, Tensor]:
        """The merged model's corrected weights and biases, but for layers with `frozen` ones; `model` is modified."""
        corrected = {}
        layers = dict(model.named_modules())
        for name in self._order[:-1]:
            layer: Any = layers[name]
            if any((f"{name}.{key}" if name else key) in frozen for key in ("weight", "bias")):
                continue
            moments = _Moments(model, only=name)
            with moments:
                moments.run(self._inputs)
            mean, deviation = moments.found()[name]
            goal_mean, goal = self._goal(name)
            scale = torch.where(deviation > _FLOOR * goal.mean(), goal / deviation.clamp_min(1e-30), 1.0)
            with torch.no_grad():
                axis = 1 if getattr(layer, "transposed", False) else 0
                shape = [-1 if a == axis else 1 for a in range(layer.weight.ndim)]
                layer.weight.mul_(scale.to(layer.weight).reshape(shape))
                corrected[f"{name}.weight" if name else "weight"] = layer.weight.detach()
                if layer.bias is not None:
                    bias = (layer.bias.double() - mean) * scale + goal_mean
                    layer.bias.copy_(bias)
                    corrected[f"{name}.bias" if name else "bias"] = layer.bias.detach()
        return corrected


class _Moments:
    """Hooks that sum channels and their squares at the outputs of linear layers and convolutions."""

    def __init__(self, model: nn.Module, only: str | None = None) -> None:
        self._model = model
        self._layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) and only in (None, name)
        }
        self.sums: dict[str, tuple[float, Tensor, Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _Moments:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name, layer)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, layer: nn.Module) -> Any:
        axis = -1 if isinstance(layer, nn.Linear) else 1

        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            flat = output.detach().movedim(axis, -1).reshape(-1, output.shape[axis]).double()
            count, total, squares = self.sums.get(name, (0.0, torch.zeros(()), torch.zeros(())))
            self.sums[name] = (count + len(flat), total + flat.sum(0), squares + flat.square().sum(0))

        return hook

    @torch.no_grad()
    def run(self, inputs: Sequence[Any]) -> None:
        """Pass all batches through the model."""
        self._model.eval()
        for x in inputs:
            call(self._model, x)

    def found(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation by layer."""
        results = {}
        for name, (count, total, squares) in self.sums.items():
            mean = total / count
            results[name] = (mean, (squares / count - mean.square()).clamp_min(0).sqrt())
        return results
