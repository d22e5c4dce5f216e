"""Clients in the tangent space of the model that all started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedmerge.edits.edit import Edit, EditContext
from fedmerge.layout import check_patterns
from fedmerge.registry import register
from fedmerge.state import State

__all__ = ["Linearised"]


@register("linearised", paper="arXiv:2305.12827")
@dataclass(frozen=True)
class Linearised(Edit):
    """Clients train, and everybody judges, the linearisation of the model that all started from.

    Ortiz-Jimenez et al. 2023, equation 5: ``f(x; w0) + J(x; w0) (w - w0)``. An update is then an update of outputs as
    well: of a mean of clients' models the outputs are the mean of theirs, and adding or taking away an update adds or
    takes away what it does to the outputs. The numbers of the update stay as they are; what this edit says is which
    function they belong to. In a federation w0 is what ``model_fn`` makes and never moves, and clients train as with
    ``LocalTraining(linearised=...)``; where models are at hand, it is their base, and what is merged comes back as a
    :class:`~fedmerge.models.tangent.Tangent`.

    Parameters
    ----------
    parameters
        Patterns of the parameters in which the model is linearised, such as ``["encoder.*"]``; all by default. Others
        train as usual.

    Examples
    --------
    >>> Linearised(parameters=["encoder.*"]).linearises
    ('encoder.*',)
    """

    parameters: Sequence[str] = ("*",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", check_patterns(self.parameters, "Linearised: parameters"))

    @property
    def linearises(self) -> tuple[str, ...]:
        """The parameters."""
        return tuple(self.parameters)

    @property
    def tensor_by_tensor(self) -> bool:
        """It leaves each as it is."""
        return True

    def edit(self, delta: State, context: EditContext) -> State:
        """The same update."""
        return delta
