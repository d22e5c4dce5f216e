"""How many labels of each class a client has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low
from typing import Any, ClassVar

import torch
from torch import nn

from fedmerge.errors import InvalidOption, shown
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics.layer_statistic import LayerStatistic
from fedmerge.statistics.statistic_type import Batches, Shapes
from fedmerge.tasks import outputs_like, reading_of
from fedmerge.training.report import TrainingReport

__all__ = ["ClassCounts"]

_MOST = 2**53  # beyond it a float does not count on
_ALIKE, _SPREAD = 1.5, 20.0  # some count labels that they leave out of training


@register("class_counts")
@dataclass(frozen=True)
class ClassCounts(LayerStatistic):
    """Labels by class, [C] under ``class_counts``, C the model's number of outputs; ``8 C`` bytes.

    Where outputs are no classes, as in regression, every example tells about each of them.

    Examples
    --------
    >>> batch = torch.randn(3, 2), torch.tensor([0, 2, 2])
    >>> ClassCounts().measure(nn.Linear(2, 4), [batch], None)["class_counts"]
    tensor([1, 0, 2, 0])
    """

    name: ClassVar[str] = "class_counts"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.int64,)
    among_metrics: ClassVar[bool] = True
    looks_inside: ClassVar[bool] = False
    of_labels: ClassVar[bool] = True

    def measure(self, model: nn.Module, batches: Batches, report: TrainingReport | None) -> State:
        """Count, with a forward pass of one example a batch to learn how many classes there are."""
        tasks = reading_of(self.task).of(model, batches)
        counts = torch.zeros(0, dtype=torch.int64)
        for inputs, targets in self.limited(batches):
            outputs = outputs_like(model, inputs)
            in_batch = tasks(inputs, outputs, targets).known(outputs, targets).cpu()
            counts = in_batch + counts if len(counts) else in_batch
        return {"class_counts": counts}

    def parse(self, value: Mapping[str, Any]) -> State:
        """Read the counts; `value` may hold other keys too, and the counts be a plain list.

        Raises
        ------
        InvalidOption
            There are none, or they are no numbers.
        """
        try:
            return {"class_counts": torch.as_tensor(value["class_counts"])}
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InvalidOption(f"statistic 'class_counts': want counts [C] under that name, got {value!r}") from error

    def check_shapes(self, shapes: Shapes, state: State) -> None:
        """Nothing: counts may come among other metrics."""

    def voted(self, shapes: Shapes) -> Shapes:
        """How many classes there are."""
        return {"class_counts": shapes["class_counts"]} if "class_counts" in shapes else {}

    def outlying(self, claims: Mapping[int, tuple[State, float]]) -> Mapping[int, str]:
        """Clients that count many more labels than go with their examples.

        How many labels an example has, the median client tells. Where more than half of the clients have as many, as in
        classification, nobody may have 1.5 times as many; else, as for sequences or pictures of other sizes, 20 times.
        Where all weights are 1 they are no numbers of examples, and nothing is known.
        """
        labels = {client: float(counts["class_counts"].double().sum()) for client, (counts, _) in claims.items()}
        shares = {client: labels[client] / weight for client, (_, weight) in claims.items() if weight > 0}
        if all(weight == 1 for _, weight in claims.values()) or not shares:
            return {}
        usual = median_low(shares.values())
        alike = sum(abs(share - usual) <= 0.01 * usual for share in shares.values())
        most = (_ALIKE if 2 * alike > len(shares) else _SPREAD) * usual
        return {
            client: f"statistic 'class_counts': it counts {labels[client]:g} labels of {claims[client][1]:g} examples, "
            f"and most clients {usual:.3g} of each"
            for client, share in shares.items()
            if share > most
        }

    def check(self, value: State, state: State) -> None:
        """Whole numbers; counts of no class can be negative, and some must be positive."""
        self.received(value, state)

    def received(self, value: State, state: State) -> State:
        """In int64."""
        counts = value.get("class_counts")
        if counts is None or counts.ndim != 1 or counts.is_complex() or counts.dtype == torch.bool:
            raise InvalidOption(f"statistic 'class_counts': want counts [C], got {shown(counts)}")
        wide = counts.detach().double()
        whole = bool(((wide >= 0) & (wide <= _MOST) & (wide == wide.round())).all())
        if not whole or not bool((wide > 0).any()):
            raise InvalidOption(f"statistic 'class_counts': want whole numbers [C], some positive, got {shown(counts)}")
        return {"class_counts": wide.to(torch.int64)}
