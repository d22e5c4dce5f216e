"""Random changes dropped, and the others enlarged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmerge.edits.edit import Edit, EditContext
from fedmerge.lookup.option_checks import check_range, check_word
from fedmerge.registry import register
from fedmerge.state import State

__all__ = ["Dare", "draw", "restored"]


@register("dare", paper="arXiv:2311.03099")
@dataclass(frozen=True)
class Dare(Edit):
    """Drop random changes of each client, and enlarge what stays (DARE: drop and rescale).

    Yu et al. 2024, equation 1: ``delta' = m o delta / (1 - p)`` with ``m ~ Bernoulli(1 - p)`` for each number and
    ``1 - p`` the `density`. Its mean over draws is ``delta``. Each client and round has draws of its own.

    Parameters
    ----------
    density
        Share of the numbers that stays, ``1 - p``, in (0, 1].
    rescale
        ``"density"`` divides by it, as the paper does. ``"l1"`` scales each tensor so that its L1 norm is what it was,
        as mergekit does: exact for every draw, but not unbiased. ``"none"`` leaves what stays as it was.

    Examples
    --------
    >>> delta = {"w": torch.ones(1000)}
    >>> kept = Dare(density=0.25).edit(delta, EditContext())["w"]
    >>> sorted(set(kept.tolist())), bool(abs(kept.mean() - 1) < 0.2)
    ([0.0, 4.0], True)
    """

    density: float = 0.5
    rescale: Literal["density", "l1", "none"] = "density"

    def __post_init__(self) -> None:
        check_range(self, "density", 0.0, 1.0, open_low=True)
        check_word(self, "rescale", ("density", "l1", "none"))

    def edit(self, delta: State, context: EditContext) -> State:
        """The draws of one client."""
        if self.density == 1.0:
            return delta
        generator = context.generator()
        edited = {}
        for name, tensor in delta.items():
            kept = tensor * draw(tensor, self.density, generator)
            if self.rescale == "density":
                kept /= self.density
            edited[name] = restored(kept, tensor) if self.rescale == "l1" else kept
        return edited


def draw(like: Tensor, keep: float | Tensor, generator: torch.Generator) -> Tensor:
    """A mask of the shape and device of `like`, true with probability `keep` (a number, or one for each entry)."""
    # Drawn on the CPU, so that the same seed keeps the same numbers on every device.
    uniform = torch.rand(like.shape, generator=generator).to(like.device)
    return uniform < keep


def restored(kept: Tensor, whole: Tensor) -> Tensor:
    """`kept` scaled to the L1 norm of `whole`; as it is where nothing stayed."""
    norm = kept.abs().sum()
    return kept if norm == 0 else kept * (whole.abs().sum() / norm)
