"""Models at hand that are linearised, or are to be merged as if they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption
from fedmerge.merging import Pipeline
from fedmerge.merging.tangent_check import check_linearised
from fedmerge.models.resize import resize
from fedmerge.models.tangent import Tangent, is_linearised, linearise

__all__ = ["as_linearised"]


def as_linearised(
    models: Sequence[nn.Module], base: Mapping[str, Tensor] | None, pipeline: Pipeline
) -> list[nn.Module]:
    """The models as the functions that they are merged as: themselves, or linearised where the method has it so.

    Parameters
    ----------
    models
        As they are at hand; none is changed.
    base
        Tensors of the model that all started from, where it is given.

    Raises
    ------
    InvalidOption
        Some are linearised and others are not, or around other points; the method does not go with that; or it
        linearises models, and there is no base.
    """
    wanted = pipeline.linearises
    given = [isinstance(model, Tangent) for model in models]
    if wanted or any(map(is_linearised, models)):
        check_linearised(pipeline)
    if wanted and not any(given):
        if base is None:
            raise InvalidOption(
                f"{type(pipeline.edits[0]).__name__} linearises the model that all started from: pass base=."
            )
        around = [linearise(resize(model, {**model.state_dict(), **base}), wanted) for model in models]
        return [resize(one, model.state_dict()) for one, model in zip(around, models, strict=True)]
    if any(given):
        first = next(model for model in models if isinstance(model, Tangent))
        for i, model in enumerate(models):
            if not isinstance(model, Tangent) or not _same_point(model, first):
                raise InvalidOption(
                    f"models[{i}] is not linearised around the same point, and in the same parameters, as another: of "
                    "such models a mean is the mean of nothing. Linearise all around the model that they started from"
                )
        if wanted:
            linearise(first, wanted)  # what the method names must be what they are linearised in
    return list(models)


def _same_point(one: Tangent, other: Tangent) -> bool:
    if one.linearised != other.linearised:
        return False
    return all(torch.equal(start, other.start[name].to(start)) for name, start in one.start.items())
