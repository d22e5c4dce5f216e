"""Models at hand of unequal depth, for methods that can take them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fedmerge.errors import InvalidOption
from fedmerge.matching.deepening import as_deep, shown_inputs
from fedmerge.merging import main_part
from fedmerge.registry import entries

__all__ = ["equally_deep"]


def equally_deep(models: list[nn.Module], method: str, example: Any, data: Iterable[Any] | None) -> list[nn.Module]:
    """The models in the form of the deepest, where the method takes those of unequal depth; as they are otherwise.

    Raises
    ------
    InvalidOption
        There are no inputs by which to tell layers.
    ModelError
        One cannot be made deeper, see :func:`~fedmerge.matching.deepening.deepened`.
    """
    found = entries("aggregator").get(main_part(method).name)
    if found is None or not found.cls.may_change_depth or len({tuple(model.state_dict()) for model in models}) == 1:
        return models
    if data is not None and iter(data) is not data:
        batch = next(iter(data), None)
        if batch is not None:
            return as_deep(models, batch[0] if isinstance(batch, tuple | list) else batch)
    if example is None:
        raise InvalidOption(
            f"{method} tells the layers of models of unequal depth by what they say: pass data=, a list of batches, or "
            "example=, one batch of inputs"
        )
    return as_deep(models, shown_inputs(example))
