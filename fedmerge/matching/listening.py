"""What neurons say on the same inputs: one pass of each model, and moments within and between models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedmerge.errors import BadUpdate, CannotMatch
from fedmerge.inputs import call
from fedmerge.permutations.spec import Site

__all__ = ["Moments", "check_heard", "consumers", "moments"]

_LINEAR = {torch.nn.functional.linear, torch._C._nn.linear}
_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_STILL = 1e-60  # a variance of nothing: its square root is far below what float32 tells from rounding
_TOGETHER = 256  # examples in one forward pass: more costs memory and is no faster


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
                self.seen.setdefault(name, []).append(x.movedim(axis, -1).reshape(-1, x.shape[axis]))
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

    def turned(self) -> Moments:
        """The same of the second model and the first."""
        return Moments(self.count, self.sum_b, self.sum_a, self.squares_b, self.squares_a, self.products.T)

    def covariance(self) -> Tensor:
        """[n_a, n_b]."""
        return self.products / self.count - torch.outer(self.sum_a, self.sum_b) / self.count**2

    def correlation(self) -> Tensor:
        """[n_a, n_b] Pearson; 0 where a neuron never changes."""
        return self.covariance() / torch.outer(*(self._variances[side].sqrt() for side in (0, 1)))

    def silent(self, side: Literal[0, 1]) -> Tensor:
        """[n], which neurons of the first or second model never change."""
        return self._variances[side].isinf()

    def mean(self, side: Literal[0, 1]) -> Tensor:
        """[n], of the first or second model."""
        return (self.sum_a, self.sum_b)[side] / self.count

    @property
    def _variances(self) -> tuple[Tensor, Tensor]:
        """Infinite where a neuron never changes."""
        variances = []
        for total, squares in ((self.sum_a, self.squares_a), (self.sum_b, self.squares_b)):
            variance = squares / self.count - (total / self.count).square()
            floor = (1e-10 * squares / self.count).clamp_min(_STILL)
            variances.append(torch.where(variance > floor, variance, torch.inf))
        return variances[0], variances[1]


def moments(
    heard_at: Sequence[Sequence[Sequence[Site]]],
    modules: Sequence[nn.Module],
    pairs: Sequence[tuple[int, int]],
    inputs: Iterable[Any],
) -> dict[tuple[int, int, int], Moments]:
    """Moments of activations for pairs of models, by ``(number of the group, a, b)``, streamed over batches.

    Products are sums in float32 within a batch, in float64 over batches.

    Parameters
    ----------
    heard_at
        For each model and group, the sites where the group is heard; what several sites hear is added up.
    modules
        The models, of one architecture; they are left in eval mode, convolutions with channels last.
    pairs
        Which of them to compare.
    inputs
        The same batches for all.
    """
    by_pair: dict[tuple[int, int, int], Moments] = {}
    names = []
    for module, groups in zip(modules, heard_at, strict=True):
        wanted = {s.parameter for sites in groups for s in sites}
        names.append({id(p): n for n, p in module.named_parameters() if n in wanted})
        if any(p.ndim == 4 for p in module.parameters()):
            module.to(memory_format=torch.channels_last)  # half the time on a CPU, and nothing to transpose
    for x in _together(inputs):
        heard = [_hear(module, known, x) for module, known in zip(modules, names, strict=True)]
        for g in range(len(heard_at[0])):
            samples = [
                [_samples(seen, site) for site in groups[g] if site.parameter in seen]
                for seen, groups in zip(heard, heard_at, strict=True)
            ]
            sums = [[(s.sum(0).double(), s.square().sum(0).double()) for s in own] for own in samples]
            for a, b in pairs:
                for first, other, own, its in zip(samples[a], samples[b], sums[a], sums[b], strict=True):
                    part = Moments(float(len(first)), own[0], its[0], own[1], its[1], (first.T @ other).double())
                    by_pair[g, a, b] = _sum(by_pair[g, a, b], part) if (g, a, b) in by_pair else part
    return by_pair


def check_heard(heard: Mapping[tuple[int, int, int], Moments], clients: Sequence[int]) -> None:
    """Make sure that what all models said can be compared.

    Parameters
    ----------
    found
        As :func:`moments` returns it.
    clients
        Whose models they are.

    Raises
    ------
    CannotMatch
        What some said is NaN or infinite, or its squares are.
    """
    faulty: set[int] = set()
    for (_, a, b), pair_moments in heard.items():
        for model, squares in ((a, pair_moments.squares_a), (b, pair_moments.squares_b)):
            if not bool(squares.isfinite().all()):
                faulty.add(model)
        if not faulty & {a, b} and not bool(pair_moments.products.isfinite().all()):
            faulty.add(a if float(pair_moments.squares_a.max()) > float(pair_moments.squares_b.max()) else b)
    if faulty:
        raise CannotMatch(
            [
                BadUpdate(
                    clients[i],
                    "what its neurons say on the server's data is NaN, infinite, or too large to be squared",
                    "Its training diverged: lower the learning rate or clip gradients.",
                )
                for i in sorted(faulty)
            ]
        )


def _together(inputs: Iterable[Any]) -> Iterator[Any]:
    """Small batches of equal shapes in one, as far as they are tensors and come one after the other."""
    waiting: list[Tensor] = []
    for x in inputs:
        if not isinstance(x, Tensor):
            yield x
            continue
        alike = not waiting or x.shape[1:] == waiting[0].shape[1:]
        if waiting and (not alike or sum(map(len, waiting)) + len(x) > _TOGETHER):
            yield torch.cat(waiting)
            waiting = []
        waiting.append(x)
    if waiting:
        yield torch.cat(waiting)


@torch.no_grad()
def _hear(module: nn.Module, names: Mapping[int, str], x: Any) -> dict[str, Tensor]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _Inputs(names) as taps:
            call(module.eval(), x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in taps.seen.items()}


def _samples(seen: Mapping[str, Tensor], site: Site) -> Tensor:
    """[samples, n]: positions that a neuron owns (space behind a flatten) are samples of it."""
    x = seen[site.parameter].detach()
    n, k = site.positions.shape
    if k == 1 and torch.equal(site.positions[:, 0], torch.arange(x.shape[1])):
        return x
    return x[:, site.positions.T.ravel().to(x.device)].reshape(-1, n)


def _sum(first: Moments, other: Moments) -> Moments:
    return Moments(
        first.count + other.count,
        first.sum_a + other.sum_a,
        first.sum_b + other.sum_b,
        first.squares_a + other.squares_a,
        first.squares_b + other.squares_b,
        first.products + other.products,
    )
