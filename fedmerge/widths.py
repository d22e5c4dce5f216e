"""Models of unequal sizes: which of the differences are neurons that can be matched."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fedmerge.errors import BadUpdate
from fedmerge.permutations.spec import PermutationSpec
from fedmerge.registry import entries
from fedmerge.state import State

__all__ = ["ALL_BUT", "check_equal_widths", "check_matchable"]

ALL_BUT = (
    "Outputs, classes and vocabularies are not matched by any method. To merge all but these layers, put one and the "
    "same new layer in their place in a copy of each model (such as nn.Linear(16, 3)), merge the copies, and train it"
)
"""What to do where heads or vocabularies differ in size."""


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
                able = ", ".join(n for n, found in entries("aggregator").items() if found.cls.may_change_width)  # type: ignore[attr-defined]
                raise BadUpdate(
                    i,
                    f"tensor {name!r} has shape {list(tensor.shape)}, the model has {list(reference[name].shape)}",
                    f"{method} merges models of equal widths; hidden widths may differ for {able}. {ALL_BUT}.",
                )


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
