"""Updates clipped around the step before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmerge.edits.edit import Edit, EditContext
from fedmerge.lookup.option_checks import check_range, check_word
from fedmerge.registry import register
from fedmerge.state import State

__all__ = ["Clip"]


@register("clip", paper="arXiv:2012.10333")
@dataclass(frozen=True)
class Clip(Edit):
    """Clip each client's update to a ball around the step before (centered clipping, CCLIP).

    Karimireddy et al. 2021, equation 3: ``delta' = v + (delta - v) min(1, radius / ||delta - v||)``, the norm taken
    over all tensors. ``v`` is what the round before moved the model by, 0 in the first round. Clients move an average
    no further than `radius` from where it went before, whatever they send.

    Parameters
    ----------
    radius
        The paper's tau, in units of parameters, positive.
    centre
        ``"last"`` as above; ``"zero"`` clips the update itself, as norm clipping does.

    Examples
    --------
    >>> Clip(radius=1.0).edit({"w": torch.tensor([3.0, 4.0])}, EditContext())["w"]
    tensor([0.6000, 0.8000])
    >>> Clip(radius=1.0).edit({"w": torch.tensor([3.0, 4.0])}, EditContext(memory={"w": torch.tensor([3.0, 1.0])}))["w"]
    tensor([3., 2.])
    """

    radius: float = 10.0
    centre: Literal["last", "zero"] = "last"

    def __post_init__(self) -> None:
        check_range(self, "radius", 0.0, math.inf, open_low=True, open_high=True)
        check_word(self, "centre", ("last", "zero"))

    @property
    def remembers(self) -> bool:
        """Where it clips around the step before."""
        return self.centre == "last"

    def edit(self, delta: State, context: EditContext) -> State:
        """Within the ball."""
        centre = context.memory
        # In float64: squares of a hostile client's numbers overflow float32 long before the numbers do.
        norms = [float(torch.linalg.vector_norm(_from(centre, name, t).double())) for name, t in delta.items()]
        norm = math.hypot(*norms)
        factor = 1.0 if norm <= self.radius else self.radius / norm
        clipped = {}
        for name, tensor in delta.items():
            scaled = _from(centre, name, tensor) * factor
            clipped[name] = scaled.add_(centre[name]) if name in centre else scaled
        return clipped

    def remembered(self, step: State, memory: State) -> State:
        """The step that the round took."""
        return step


def _from(centre: State, name: str, tensor: Tensor) -> Tensor:
    return tensor - centre[name] if name in centre else tensor
