"""Models of clients' own out of models that are at hand, without a federation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from fedmerge.checks.raw_errors import named
from fedmerge.errors import InvalidOption
from fedmerge.merging import MergeResult, Pipeline, build_pipeline, main_part
from fedmerge.models.resize import copy_of, resize
from fedmerge.offline.arguments import MergeArguments, check_keywords, check_method, check_signs
from fedmerge.offline.at_hand import AtHand, plain_modules
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["personal_models"]


def personal_models(
    models: Sequence[nn.Module],
    method: str = "emr",
    *,
    base: nn.Module,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    **options: Any,
) -> list[nn.Module]:
    """Merge trained models, and give each back as the merge remembers it: the shared model under a mask of its own.

    What a client needs for its model, besides `base` and the shared model of :func:`fedmerge.merge`, is one bit a
    parameter and one number; see :class:`~fedmerge.personal.PersonalPart`. Buffers, such as those of batch norm, are
    the shared model's.

    Parameters
    ----------
    models
        Modules of one architecture; none is modified.
    method
        One that keeps a mask for each client, ``"emr"`` or ``"tall_masks"``, edits in front of it allowed.
    base
        The model that all started from.
    weights
        One number per model, such as its examples; only their ratios matter. Equal where not given.
    seed
        Root of random streams, where an edit has any.
    options
        Hyper-parameters of the method.

    Returns
    -------
    list
        A new module for each of `models`, in their order.

    Raises
    ------
    UnknownName
        No such method or option.
    InvalidOption
        The method makes one model for all, or asks clients or data for more; or an option is out of range.
    BadUpdate
        A model that cannot be merged with the others: NaN, missing tensor, wrong shape, zero weight.

    Examples
    --------
    >>> import torch
    >>> base, first, second = (nn.Linear(2, 1, bias=False) for _ in range(3))
    >>> for model, row in ((base, [0.0, 0.0]), (first, [4.0, 0.0]), (second, [0.0, -2.0])):
    ...     _ = model.weight.data.copy_(torch.tensor([row]))
    >>> [one.weight.tolist() for one in personal_models([first, second], "tall_masks", base=base)]
    [[[4.0, 0.0]], [[0.0, -2.0]]]
    """
    check_method(method)
    with named(f"personal models by {method}"):
        check_keywords(method, options, inspect.signature(personal_models).parameters)
        hand = AtHand.of(plain_modules(models), base)
        pipeline = build_pipeline(method, {main_part(method).name: options}, on_bad_update="raise")
        _check(pipeline, method)
        arguments = MergeArguments.of(hand, weights, None, None, None, None, seed)
        check_signs(arguments.weights, method, pipeline.aggregator)
        result = _merged(hand, pipeline, arguments)
        first, start, routing = hand.models[0], hand.base or {}, result.routing
        own = [part.of(result.state, start, hand.tied) for part in result.personal.values()]
        if routing is not None:
            own = [routing.of_client(i).unloaded(result.state, tied=hand.tied) for i in sorted(routing.own)]
        if not own:
            raise InvalidOption(f"{method} makes one model for all: take emr or tall_masks, or fedmerge.merge")
        return [resize(first, {**first.state_dict(), **start, **state}) for state in own]


def _check(pipeline: Pipeline, method: str) -> None:
    aggregator = pipeline.aggregator
    asks = pipeline.measured or pipeline.refinements or aggregator.several_exchanges
    if asks or aggregator.requires_data or aggregator.requires_model or aggregator.local_rule:
        raise InvalidOption(
            f"{method} asks clients or the server's data for more than models, and makes no model of a client's own: "
            "take emr or tall_masks"
        )


def _merged(hand: AtHand, pipeline: Pipeline, arguments: MergeArguments) -> MergeResult:
    updates = [ClientUpdate(i, state, arguments.weights[i]) for i, state in enumerate(hand.states)]
    context = MergeContext(
        base=hand.base,
        seed=arguments.seed,
        model_fn=lambda: copy_of(hand.models[0]),
        frozen=hand.frozen,
        tied=hand.tied,
        told={},
    )
    return pipeline.merge(updates, context, buffers=hand.buffers)
