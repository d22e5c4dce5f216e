"""Models of clients' own that clients judge, where a method makes them out of the shared one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord

from fedmerge.merging import MergeResult
from fedmerge.personal import PersonalPart
from fedmerge.state import State
from fedmerge.wire.record_values import to_arrays, view_arrays

__all__ = ["OwnModels"]


@dataclass(frozen=True)
class OwnModels:
    """The personal parts of the last merge, and what they are relative to.

    Parameters
    ----------
    parts
        By node.
    base
        The model that clients started from.
    tied
        By further names of shared parameters, their first.
    """

    parts: Mapping[int, PersonalPart] = field(default_factory=dict)
    base: State = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, result: MergeResult, nodes: Mapping[int, int], base: State | None, tied: Mapping[str, str]
    ) -> OwnModels:
        """Those of a merge whose clients answered from these nodes."""
        parts = {nodes[client]: part for client, part in result.personal.items() if client in nodes}
        return cls(parts, base or {}, tied)

    @property
    def bytes(self) -> int:
        """What clients need to make their models of the shared one: a bit a parameter and a number, each its own."""
        return sum(part.bytes for part in self.parts.values())

    def judged_by(self, node: int, arrays: ArrayRecord) -> ArrayRecord:
        """The model that a node judges: its own of the shared model `arrays`, or that where it took no part."""
        part = self.parts.get(node)
        return arrays if part is None else to_arrays(part.of(view_arrays(arrays), self.base, self.tied))
