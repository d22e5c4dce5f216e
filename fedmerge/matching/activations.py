"""What neurons say on the same inputs: moments within and between models, and matching by correlation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedmerge.errors import InvalidOption
from fedmerge.matching.assignment import assign, assign_blocks
from fedmerge.matching.features import Unit, units
from fedmerge.permutations.spec import PermutationSpec, Site

__all__ = ["Moments", "consumers", "match_activations", "moments"]

_LINEAR = {torch.nn.functional.linear, torch._C._nn.linear}
_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class _Inputs(TorchFunctionMode):
    """Keeps what goes into products with certain weights, as [examples, features] or [examples, channels]."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self.seen: dict[str, list[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LINEAR or func in _CONVOLUTIONS:
            x = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            name = self._names.get(id(weight))
            if name is not None:
                axis = -1 if func in _LINEAR else x.ndim - _CONVOLUTIONS[func] - 1
                self.seen.setdefault(name, []).append(x.detach().movedim(axis, -1).reshape(-1, x.shape[axis]))
        return func(*args, **kwargs)


def consumers(sites: Sequence[Site]) -> list[Site]:
    """Sites whose neurons go into a linear layer or a convolution: there they can be heard."""
    return [site for site in sites if site.role == "in"]


@dataclass
class Moments:
    """Sums over samples of one group's activations in two models (which may be one): [n_a], [n_b] and [n_a, n_b]."""

    count: float
    sum_a: Tensor
    sum_b: Tensor
    squares_a: Tensor
    squares_b: Tensor
    products: Tensor

    def covariance(self) -> Tensor:
        """[n_a, n_b]."""
        return self.products / self.count - torch.outer(self.sum_a, self.sum_b) / self.count**2

    def correlation(self) -> Tensor:
        """[n_a, n_b] Pearson; 0 where a neuron never changes."""
        deviations = []
        for total, squares in ((self.sum_a, self.squares_a), (self.sum_b, self.squares_b)):
            variance = squares / self.count - (total / self.count).square()
            floor = 1e-10 * (squares / self.count).clamp_min(1e-300)
            deviations.append(torch.where(variance > floor, variance, torch.inf).sqrt())
        return self.covariance() / torch.outer(*deviations)


def moments(
    heard_at: Sequence[Sequence[Sequence[Site]]],
    modules: Sequence[nn.Module],
    pairs: Sequence[tuple[int, int]],
    inputs: Iterable[Tensor],
) -> dict[tuple[int, int, int], Moments]:
    """Moments of activations for pairs of models, by ``(number of the group, a, b)``, streamed over batches.

    Parameters
    ----------
    heard_at
        For each model and group, the sites where the group is heard; what several sites hear is added up.
    modules
        The models, of one architecture.
    pairs
        Which of them to compare.
    inputs
        The same batches for all.
    """
    found: dict[tuple[int, int, int], Moments] = {}
    names = []
    for module, groups in zip(modules, heard_at, strict=True):
        wanted = {s.parameter for sites in groups for s in sites}
        names.append({id(p): n for n, p in module.named_parameters() if n in wanted})
    for x in inputs:
        heard = [_hear(module, known, x) for module, known in zip(modules, names, strict=True)]
        for g in range(len(heard_at[0])):
            samples = [
                [_samples(seen, site) for site in groups[g] if site.parameter in seen]
                for seen, groups in zip(heard, heard_at, strict=True)
            ]
            for a, b in pairs:
                for one, other in zip(samples[a], samples[b], strict=True):
                    _add(found, (g, a, b), one, other)
    return found


@torch.no_grad()
def _hear(module: nn.Module, names: Mapping[int, str], x: Tensor) -> dict[str, Tensor]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _Inputs(names) as taps:
            module.eval()(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return {name: torch.cat(parts) for name, parts in taps.seen.items()}


def _samples(seen: Mapping[str, Tensor], site: Site) -> Tensor:
    """[samples, n]: positions that a neuron owns (space behind a flatten) are samples of it."""
    x = seen[site.parameter][:, site.positions.ravel().to(seen[site.parameter].device)]
    return x.reshape(len(x), *site.positions.shape).transpose(1, 2).reshape(-1, len(site.positions))


def _add(found: dict[tuple[int, int, int], Moments], key: tuple[int, int, int], a: Tensor, b: Tensor) -> None:
    parts = (
        a.sum(0).double(), b.sum(0).double(), a.square().sum(0).double(), b.square().sum(0).double(), (a.T @ b).double()
    )  # fmt: skip
    known = found.get(key)
    if known is None:
        found[key] = Moments(float(len(a)), *parts)
        return
    known.count += len(a)
    for name, part in zip(("sum_a", "sum_b", "squares_a", "squares_b", "products"), parts, strict=True):
        setattr(known, name, getattr(known, name) + part)


def match_activations(
    spec: PermutationSpec, modules: Sequence[nn.Module], inputs: Iterable[Tensor], anchor: int
) -> list[list[Tensor]]:
    """Permutations of each model under which its activations correlate most with the anchor's.

    Raises
    ------
    InvalidOption
        There are no inputs.
    """
    parts = units(spec)
    groups = [consumers(sites) for unit in parts for sites in (unit.sites, *unit.kind_sites)]
    pairs = [(anchor, j) for j in range(len(modules)) if j != anchor]
    found = moments([groups] * len(modules), modules, pairs, inputs)
    if not found and any(groups):
        raise InvalidOption("matching by activations needs inputs on the server: pass data=.")
    perms = [spec.identity() for _ in modules]
    for _, j in pairs:
        number = 0
        for unit in parts:
            heard = [found.get((number + i, anchor, j)) for i in range(1 + len(unit.kinds))]
            number += 1 + len(unit.kinds)
            _assign(unit, [None if h is None else h.correlation() for h in heard], perms[j])
    return perms


def _assign(unit: Unit, heard: Sequence[Tensor | None], perms: list[Tensor]) -> None:
    """Assign one unit from correlations; what could not be heard stays as it is."""
    own = heard[0] if heard[0] is not None else torch.zeros(unit.size, unit.size, dtype=torch.float64)
    if not unit.kinds:
        if heard[0] is not None:
            perms[unit.index] = assign(own)
        return
    kinds = []
    for kind, similarity in zip(unit.kinds, heard[1:], strict=True):
        size = len(perms[kind[0]])
        known = torch.eye(unit.size * size, dtype=torch.float64) * 1e-6 if similarity is None else similarity
        kinds.append(known.reshape(unit.size, size, unit.size, size))
    outer, within = assign_blocks(own, kinds)
    perms[unit.index] = outer
    for kind, found in zip(unit.kinds, within, strict=True):
        for place in range(unit.size):
            perms[kind[int(outer[place])]] = found[place]
