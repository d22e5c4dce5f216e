"""Transformers turned into one basis: orthogonal matrices on streams and heads besides permutations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedmerge.aggregators.aligning import Aligning
from fedmerge.errors import ModelError
from fedmerge.lookup.option_checks import check_range
from fedmerge.matching.symmetries import symmetries
from fedmerge.matching.turning import turn_many
from fedmerge.permutations.rotations import Rotations, rotations
from fedmerge.registry import register
from fedmerge.state import State, accumulator_dtype
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Glmc"]


@register("glmc", paper="arXiv:2506.22712")
@dataclass(frozen=True)
class Glmc(Aligning):
    """Neurons turned by orthogonal matrices where the model permits it, re-ordered elsewhere; then the average.

    Theus et al. 2025 (generalised linear mode connectivity): a residual stream x may become ``Q x`` with every matrix
    that writes to it multiplied by Q and every one that reads from it by ``Q^T``; queries and keys of a head may be
    turned together, and so may values and what reads them; heads are exchanged as wholes, and units behind a ReLU
    only re-ordered. Scales and shifts of norms are folded into the layers behind them first, which leaves 1 and 0. An
    RMS norm permits any Q, a layer norm those that keep the mean. What may be turned is traced, and proved by trial.
    Matches are found on weights, by Procrustes and assignment in turns.

    Parameters
    ----------
    sweeps
        At most so many rounds over all groups, at least 1.
    strict
        Whether a model is refused that has a normed stream which may not be turned; otherwise such a stream is only
        re-ordered, as everything is in a model without streams and heads.

    Examples
    --------
    >>> import copy, torch, fedmerge
    >>> from torch import nn
    >>> a = nn.Sequential(nn.Linear(9, 4), nn.RMSNorm(4), nn.Linear(4, 2))
    >>> b, q = copy.deepcopy(a), torch.linalg.qr(torch.randn(4, 4))[0]
    >>> b[0].weight.data, b[0].bias.data, b[2].weight.data = q @ a[0].weight, q @ a[0].bias, a[2].weight @ q.T
    >>> x = torch.randn(5, 9)
    >>> torch.allclose(fedmerge.merge([a, b], "glmc", example=x)(x), a(x), atol=1e-5)
    True
    """

    sweeps: int = 10
    strict: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "sweeps", 1, float("inf"), open_high=True)

    def align(self, updates: Sequence[ClientUpdate], context: MergeContext) -> Iterator[ClientUpdate]:
        """Fold norms and turn each client's neurons."""
        if len(updates) == 1:
            yield from updates
            return
        turns = self._turns(context, updates[0].state)
        prepared = [turns.prepared(_wide(update.state)) for update in updates]
        generator = context.torch_generator("glmc")
        turned = turn_many(turns, prepared, [u.weight for u in updates], sweeps=self.sweeps, generator=generator)
        for update, state in zip(updates, turned, strict=True):
            yield replace(update, state={name: tensor.to(update.state[name]) for name, tensor in state.items()})

    def _turns(self, context: MergeContext, state: State) -> Rotations:
        """What may be turned.

        Raises
        ------
        ModelError
            A stream may not be turned, and `strict` says that it has to be.
        """
        module = context.module(state, "Glmc")
        spec = symmetries(context, state, "Glmc")
        turns = rotations(spec, module, context.shown("Glmc"), context.frozen)
        if self.strict and turns.refused:
            raise ModelError(
                f"glmc: {'; '.join(turns.refused.values())}. Take rebasin, which re-orders neurons, or "
                "glmc(strict=false), which does so where they may not be turned"
            )
        return turns


def _wide(state: State) -> State:
    return {n: t.to(accumulator_dtype(t.dtype)) if t.is_floating_point() else t for n, t in state.items()}
