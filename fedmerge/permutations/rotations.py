"""Which groups of neurons may be turned by orthogonal matrices, not only re-ordered, without changing a function."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedmerge.inputs import changed
from fedmerge.permutations.folding import Fold, folded, norms_of
from fedmerge.permutations.running import copied, few_rows, undisturbed
from fedmerge.permutations.spec import PermutationSpec, Site
from fedmerge.permutations.trial import trial
from fedmerge.permutations.verify import Comparison
from fedmerge.seeding import torch_generator
from fedmerge.state import State, accumulator_dtype

__all__ = ["Kind", "Rotations", "nearest_rotation", "random_rotation", "rotations"]

Kind = Literal["full", "centred"]
"""All orthogonal matrices, or those that leave the mean of the neurons: what a layer norm, which subtracts it, permits.
"""

_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Rotations:
    """The groups of a spec that may be turned, once scales and shifts of norms are folded.

    Parameters
    ----------
    spec
        The permutations, of which these are an extension.
    folds
        What is to be folded first, see :meth:`prepared`.
    kinds
        By index of a group that may be turned, how.
    streams
        Indices of groups that a layer or RMS norm with a scale stands on: residual streams.
    refused
        By index of a stream that may not be turned, why.
    """

    spec: PermutationSpec
    folds: tuple[Fold, ...]
    kinds: Mapping[int, Kind]
    streams: tuple[int, ...] = ()
    refused: Mapping[int, str] | None = None

    def prepared(self, state: State) -> dict[str, Tensor]:
        """The state of the same function whose streams may be turned."""
        return folded(state, self.folds)

    def sites(self, group: int) -> list[Site]:
        """Where a group stands, without norms that are folded, whose ones stay ones."""
        gone = {name for fold in self.folds for name in (fold.scale, fold.shift)}
        return [site for site in self.spec.groups[group].sites if site.parameter not in gone]

    def turned(self, state: State, matrices: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """A prepared state with the neurons of groups turned: by index, orthogonal [n, n] matrices of its kind.

        Neurons that come out of a tensor are multiplied by Q, those that go into one by its transpose's inverse, Q too.
        """
        moved = dict(state)
        for group, matrix in matrices.items():
            for site in self.sites(group):
                if site.parameter in moved:
                    moved[site.parameter] = _turned(moved[site.parameter], site, matrix)
        for alias, name in self.spec.aliases.items():
            if alias in moved:
                moved[alias] = moved[name]
        return moved


def rotations(spec: PermutationSpec, model: nn.Module, example: Any, frozen: Collection[str] = ()) -> Rotations:
    """Find which groups of a traced model may be turned, by trial.

    Norms are folded where that leaves the outputs as they are. Then each group without blocks is turned at random, by
    any orthogonal matrix first and by one that keeps the mean then: what leaves the outputs, to 1e-6 of their size, is
    a symmetry. As for :func:`~fedmerge.permutations.verify`, the trial runs in float64 with scales, shifts and biases
    drawn at random, so that nothing passes by the luck of fresh values.

    Parameters
    ----------
    spec
        As :func:`~fedmerge.permutations.trace` gives it.
    model, example
        What was traced.
    frozen
        Parameters that may not be changed.

    Raises
    ------
    ModelError
        The model cannot be exported or run.

    Examples
    --------
    >>> from fedmerge.permutations import trace
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    >>> turns = rotations(trace(model, torch.zeros(2, 4)), model, torch.zeros(2, 4))
    >>> {turns.spec.groups[i].name: kind for i, kind in turns.kinds.items()}
    {'0.weight': 'centred'}
    """
    generator = torch_generator(0, "rotations")
    with undisturbed():
        own = copied(model).cpu().eval()
        few = few_rows(own, changed(example, lambda tensor: tensor.detach().cpu()))
        norms = norms_of(own, few, frozen)
        comparison = Comparison(trial(own, few, spec.aliases, generator), generator)
        start = comparison.trial.state

        def same(state: State) -> bool:
            return comparison.error(state, _TOLERANCE) <= _TOLERANCE

        folds: list[Fold] = []
        reasons = {fold.scale: fold.reason for fold in norms}
        for fold in norms:
            if not fold.reason and same(folded(start, [fold])):
                folds.append(fold)
            elif not fold.reason:
                lacking = [weight for weight in fold.weights if weight not in (fold.biases or {})]
                reasons[fold.scale] = (
                    f"{lacking[0]!r}, behind it, has no bias to take its shift" if lacking else "it cannot be folded"
                )
        bare = Rotations(spec, tuple(folds), {})
        prepared, refused = bare.prepared(start), dict[int, str]()
        kinds: dict[int, Kind] = {}
        ways: tuple[Kind, ...] = ("full", "centred")
        streams = tuple(
            i for i, group in enumerate(spec.groups) if any(site.parameter in reasons for site in group.sites)
        )
        for i, group in enumerate(spec.groups):
            if group.inner or group.size < 2 or any(site.groups > 1 for site in group.sites):
                continue
            for kind in ways:
                if same(bare.turned(prepared, {i: random_rotation(group.size, kind, generator)})):
                    kinds[i] = kind
                    break
            if i in streams and i not in kinds:
                refused[i] = _why(group.name, [s.parameter for s in group.sites], reasons)
    return Rotations(spec, tuple(folds), kinds, streams, refused)


def random_rotation(size: int, kind: Kind, generator: torch.Generator | None = None) -> Tensor:
    """An orthogonal matrix [size, size] at random, in float64.

    Examples
    --------
    >>> q = random_rotation(3, "centred", torch.Generator().manual_seed(0))
    >>> torch.allclose(q @ q.T, torch.eye(3).double()), torch.allclose(q.sum(1), torch.ones(3).double())
    (True, True)
    """
    return nearest_rotation(torch.randn(size, size, generator=generator, dtype=torch.float64), kind)


def nearest_rotation(covariance: Tensor, kind: Kind) -> Tensor:
    """The Q of this kind that maximises ``<covariance, Q>``, orthogonal Procrustes: ``U V^T`` of its decomposition.

    With ``covariance = A B^T`` it is that of the least ``||A - Q B||``.

    Parameters
    ----------
    covariance
        [n, n].
    kind
        ``"centred"`` keeps ``Q 1 = 1``.

    Examples
    --------
    >>> nearest_rotation(torch.tensor([[0.0, 2.0], [-3.0, 0.0]]), "full").round().int().tolist()
    [[0, 1], [-1, 0]]
    """
    covariance = covariance.double()
    if kind == "full":
        left, _, right = torch.linalg.svd(covariance)
        nearest: Tensor = left @ right
        return nearest
    size = len(covariance)
    basis = torch.linalg.qr(torch.cat([torch.ones(size, 1), torch.eye(size)[:, 1:]], 1).to(covariance))[0][:, 1:]
    left, _, right = torch.linalg.svd(basis.T @ covariance @ basis)
    centred: Tensor = basis @ (left @ right) @ basis.T + torch.full_like(covariance, 1 / size)
    return centred


def _turned(tensor: Tensor, site: Site, matrix: Tensor) -> Tensor:
    wide = accumulator_dtype(tensor.dtype)
    moved = tensor.movedim(site.axis, 0).clone()
    places = site.positions.to(tensor.device)
    mixed = torch.tensordot(matrix.to(tensor.device, wide), moved[places].to(wide), 1)
    moved[places] = mixed.to(tensor.dtype)
    return moved.movedim(0, site.axis).contiguous()


def _why(group: str, names: Sequence[str], reasons: Mapping[str, str]) -> str:
    left = [f"norm {name!r} cannot be folded ({reasons[name]})" for name in names if reasons.get(name)]
    return f"the stream {group!r} cannot be turned: " + ("; ".join(left) or "an operator on it works neuron by neuron")
