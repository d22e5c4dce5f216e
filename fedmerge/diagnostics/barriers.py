"""The line between two models: how high loss rises on the way from one to the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption, ModelError
from fedmerge.models.resize import copy_of, fill
from fedmerge.state import accumulator_dtype
from fedmerge.statistics.batch_norm import BatchNormMoments
from fedmerge.statistics.statistic_type import Batches
from fedmerge.training.judged import Judged, judge

__all__ = ["Barrier", "barrier"]


@dataclass(frozen=True)
class Barrier:
    """Loss and accuracy along the line from model a (position 0) to model b (position 1)."""

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]

    @property
    def height(self) -> float:
        """``max_t L(t) - [(1 - t) L(0) + t L(1)]`` over the points: 0 or more, as it is 0 at both ends."""
        first, last = self.losses[0], self.losses[-1]
        pairs = zip(self.positions, self.losses, strict=True)
        return max(loss - (1 - t) * first - t * last for t, loss in pairs)


def barrier(
    a: nn.Module, b: nn.Module, batches: Batches, points: int = 11, *, recalibrate: Batches | None = None
) -> Barrier:
    """Loss and accuracy along the line between the parameters of two models, ends included.

    Parameters
    ----------
    a, b
        Of one architecture and one width; neither is modified.
    batches
        ``(inputs, targets)`` to judge by; they are read once for each point.
    points
        How many, evenly spaced, at least 2.
    recalibrate
        Batches, best of training data, on which batch-norm statistics are measured afresh at every point, the
        ends too. Without them the statistics are interpolated as parameters are, which makes barriers of models
        with batch norm look higher than they are (arXiv:2211.08403).

    Raises
    ------
    ModelError
        The models differ in names or shapes.
    InvalidOption
        Fewer than two points, or no examples.

    Examples
    --------
    >>> a, b = nn.Linear(1, 2), nn.Linear(1, 2)
    >>> data = [(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))]
    >>> barrier(a, b, data).height < 1e-6  # cross-entropy is convex in one layer
    True
    """
    if points < 2:
        raise InvalidOption(f"points must be at least 2, the ends of the line, got {points}")
    start, end = a.state_dict(), b.state_dict()
    shapes = [{name: tuple(t.shape) for name, t in state.items()} for state in (start, end)]
    if shapes[0] != shapes[1]:
        differ = sorted(n for n in {*start, *end} if shapes[0].get(n) != shapes[1].get(n))
        raise ModelError(f"there is no line between models of different shapes: {', '.join(map(repr, differ[:3]))}")
    # An iterator would be used up at the first point.
    kept, fresh = (list(x) if isinstance(x, Iterator) else x for x in (batches, recalibrate))
    module = copy_of(a)
    positions = tuple(i / (points - 1) for i in range(points))
    curve = []
    for t in positions:
        fill(module, {name: _between(tensor, end[name], t) for name, tensor in start.items()})
        if fresh is not None:
            moments = BatchNormMoments().measure(module, _on(module, fresh), None)
            fill(module, moments, strict=False)
        curve.append(_judged(module, kept or ()))
    losses, accuracies = zip(*curve, strict=True)
    return Barrier(positions, losses, accuracies)


def _between(a: Tensor, b: Tensor, t: float) -> Tensor:
    if not (a.is_floating_point() or a.is_complex()):
        return a  # counters have no line between them
    dtype = accumulator_dtype(a.dtype)
    return ((1 - t) * a.to(dtype) + t * b.to(a.device, dtype)).to(a.dtype)


def _on(module: nn.Module, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the module's device.

    Raises
    ------
    InvalidOption
        There are none.
    """
    device = next((p.device for p in module.parameters()), None)
    number = 0
    for number, (x, y) in enumerate(batches, 1):  # noqa: B007 - counts what came
        yield x.to(device), y.to(device)
    if not number:
        raise InvalidOption("there are no examples to measure on: pass batches of (inputs, targets)")


@torch.no_grad()
def _judged(module: nn.Module, batches: Batches) -> tuple[float, float]:
    """Mean loss and accuracy over all labels that count."""
    judged = sum((judge(module, x, y) for x, y in _on(module, batches)), Judged())
    return judged.loss, judged.accuracy
