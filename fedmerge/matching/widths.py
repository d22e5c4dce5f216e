"""Models of unequal sizes: which of the differences are neurons that can be matched."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from fedmerge.checks.raw_errors import RAW
from fedmerge.errors import BadUpdate, CannotMatch, ModelError
from fedmerge.matching.symmetries import symmetries
from fedmerge.permutations.spec import PermutationSpec
from fedmerge.registry import entries
from fedmerge.state import State

if TYPE_CHECKING:
    from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["ALL_BUT", "WIDER", "check_equal_widths", "check_matchable", "check_widest", "check_widths"]

ALL_BUT = (
    "Outputs, classes and vocabularies are not matched by any method. To merge all but these layers, leave them out: "
    'leave_out=["head.*"], or --leave-out; of vocabularies, fedmerge.merge(..., rows=) merges the rows that they share'
)
"""What to do where heads or vocabularies differ in size."""

WIDEST = 32
"""How many times as wide as the model sent a client's may be."""

WIDER = 4
"""How many times as wide as the median a client may be, where three or more are merged."""


def check_equal_widths(states: Sequence[State], reference: State, method: str) -> None:
    """Make sure that models have the shapes of `reference`, for a method that can merge no others.

    Raises
    ------
    BadUpdate
        One has not; the error names the methods that may be able to.
    """
    for i, state in enumerate(states):
        for name, tensor in state.items():
            if name in reference and tensor.shape != reference[name].shape:
                able = ", ".join(n for n, entry in entries("aggregator").items() if entry.cls.may_change_width)
                raise BadUpdate(
                    i,
                    f"tensor {name!r} has shape {list(tensor.shape)}, the model has {list(reference[name].shape)}",
                    f"{method} merges models of equal widths; hidden widths may differ for {able}. {ALL_BUT}.",
                )


def check_widest(clients: Sequence[int], states: Sequence[State]) -> None:
    """Make sure that no client of three or more makes everybody's model far wider than most have it.

    The merged model is as wide as the widest client, everybody trains it from then on, and matching takes time by the
    cube of a width.

    Raises
    ------
    CannotMatch
        Some are more than :data:`WIDER` times as wide as the median.
    """
    if len(states) < 3:
        return
    problems: dict[int, BadUpdate] = {}
    for name, first in states[0].items():
        for axis in range(first.ndim):
            widths = [state[name].shape[axis] for state in states]
            middle = sorted(widths)[(len(widths) - 1) // 2]
            for client, width in zip(clients, widths, strict=True):
                if width > WIDER * max(1, middle):
                    reason = f"tensor {name!r} has {width} along axis {axis}, most clients {middle}"
                    remedy = f"No client's layers may be more than {WIDER} times as wide as the median."
                    problems.setdefault(client, BadUpdate(client, reason, remedy))
    if problems:
        raise CannotMatch(list(problems.values()))


def check_widths(
    update: ClientUpdate, other: Sequence[str], reference: State, context: MergeContext, method: str
) -> None:
    """Make sure that other widths than the reference's make a model that runs, and differ in hidden neurons only.

    `other` are the names of the tensors whose shapes differ from the reference's.

    Raises
    ------
    BadUpdate
        They do not, or are far wider.
    """
    for name in other:  # matching takes memory by the square of a width
        have, base = update.state[name].shape, reference[name].shape
        if len(have) != len(base) or any(n > WIDEST * max(1, m) for n, m in zip(have, base, strict=True)):
            raise BadUpdate(
                update.client,
                f"tensor {name!r} has shape {list(have)}, more than {WIDEST} times the base's {list(base)}",
                "Start from a model of about the clients' widths.",
            )
    try:
        spec = symmetries(context, update.state, method)
    except (ModelError, *RAW) as error:
        shapes = ", ".join(f"{name!r} {list(update.state[name].shape)}" for name in other[:3])
        raise BadUpdate(
            update.client, f"its shapes make no model that runs: {shapes}", "Send widths that fit each other."
        ) from error
    check_matchable(update.client, update.state, reference, other, spec)


def check_matchable(client: int, state: State, reference: State, other: Collection[str], spec: PermutationSpec) -> None:
    """Make sure that where a state's sizes differ from the reference's there stand neurons, which can be matched.

    Parameters
    ----------
    client
        Whose state it is.
    state, reference
        With the same names.
    other
        Names of the tensors whose shapes differ.
    spec
        Of the state's model.

    Raises
    ------
    BadUpdate
        Something else differs, such as the number of classes.
    """
    for name in other:
        pairs = zip(state[name].shape, reference[name].shape, strict=True)
        for axis, (have, want) in enumerate(pairs):
            if have != want and (spec.aliases.get(name, name), axis) not in spec.touching:
                raise BadUpdate(
                    client,
                    f"tensor {name!r} has {have} along axis {axis}, the model {want}, and these are no hidden neurons",
                    f"{ALL_BUT}.",
                )
