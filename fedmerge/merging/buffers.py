"""Buffers of many clients into one: running statistics by policy, counters by maximum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedmerge.checks.magnitudes import bounded
from fedmerge.errors import InvalidOption
from fedmerge.layout import BatchNormPolicy, Layout
from fedmerge.state import State, WeightedSum, accumulator_dtype, as_rows, is_norm_statistic

__all__ = ["BufferFold", "check_policy", "pool_moments"]


_POLICIES = ("mean", "pooled", "recalibrate", "local")


def check_policy(policy: str) -> None:
    """Check the name of a policy.

    Raises
    ------
    InvalidOption
        There is none of that name.
    """
    if policy not in _POLICIES:
        raise InvalidOption(f"batch_norm must be one of {', '.join(_POLICIES)}; got {policy!r}")


class BufferFold:
    """Folds the buffers of a stream of clients; parameters are the aggregator's.

    A buffer that most clients return as it was in `start`, the model sent, stays as it was, but for statistics and
    counters of norms: what nobody trains, such as a table of places or a mask, is no single client's to change.
    """

    def __init__(self, layout: Layout, policy: BatchNormPolicy, start: State | None = None) -> None:
        self._layout = layout
        self._policy = policy
        self._untouched = _Untouched(layout, start)
        self._moments = _PooledMoments() if policy == "pooled" else WeightedSum()
        self._integers: dict[str, Tensor] = {}
        self._range = _Range()

    def add(self, state: State, weight: float) -> None:
        """Add one client's buffers."""
        if self._policy != "local":
            floats = {name: state[name] for name in self._layout.float_buffers}
            self._moments.add(floats, weight)
            self._range.add(floats, floats)
        self._count(state)
        self._untouched.add({name: tensor[None] for name, tensor in state.items()})

    def add_stacked(self, states: State, weights: Sequence[float]) -> None:
        """Add many clients' buffers, tensors [K, ...]."""
        if self._policy == "mean":
            floats = {name: states[name] for name in self._layout.float_buffers}
            self._moments.add_stacked(floats, weights)
            self._range.add_stacked(floats)
            self._count({name: states[name].amax(0) for name in self._layout.integer_buffers})
            self._untouched.add(states)
            return
        for k, weight in enumerate(weights):
            self.add({name: stacked[k] for name, stacked in states.items()}, weight)

    def join(self, other: BufferFold) -> BufferFold:
        """Add the buffers that another has folded; `other` must not be used again."""
        self._moments.join(other._moments)
        self._range.add(other._range.low, other._range.high)
        self._count(other._integers)
        self._untouched.join(other._untouched)
        return self

    def _count(self, state: State) -> None:
        for name in self._layout.integer_buffers:
            if name in state:
                known = self._integers.get(name)
                self._integers[name] = state[name].clone() if known is None else torch.maximum(known, state[name])

    def finish(self, base: State | None) -> dict[str, Tensor]:
        """The merged buffers; under ``local`` those of `base`, where there is one."""
        if self._policy == "local":
            kept = base or {}
            floats = {n: kept[n].clone() for n in self._layout.float_buffers if n in kept}
        else:
            floats = self._range.kept(self._moments.mean(), pooled=self._policy == "pooled")
            floats = {n: bounded(t, base[n] if base else t) if is_norm_statistic(n) else t for n, t in floats.items()}
        return {**floats, **self._integers, **self._untouched.tensors()}


class _Untouched:
    """How many clients return each buffer as it was."""

    def __init__(self, layout: Layout, start: State | None) -> None:
        names = [*layout.float_buffers, *layout.integer_buffers]
        kept = [n for n in names if not is_norm_statistic(n) and not n.endswith("num_batches_tracked")]
        self._start = {name: start[name] for name in kept if name in (start or ())} if start else {}
        self._same = dict.fromkeys(self._start, 0)
        self._clients = 0

    def add(self, states: State) -> None:
        """Clients, tensors [K, ...]."""
        self._clients += len(next(iter(states.values()), ()))
        for name, start in self._start.items():
            if name in states and states[name].shape[1:] == start.shape:
                equal = as_rows(states[name]) == as_rows(start[None]).to(states[name].device)
                self._same[name] += int(equal.all(1).sum())

    def join(self, other: _Untouched) -> None:
        """The clients of both."""
        self._clients += other._clients
        self._same = {name: count + other._same[name] for name, count in self._same.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The buffers that more than half of the clients return as they were."""
        return {name: self._start[name].clone() for name, same in self._same.items() if 2 * same > self._clients}


class _Range:
    """Least and largest of every entry over the clients: what is equal in all of them is no matter of means.

    A mean of equal numbers differs from them in the last bit, and a mean of the -inf in masks of attention is none.
    """

    def __init__(self) -> None:
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}

    def add(self, low: State, high: State) -> None:
        """Another client, or those of another range."""
        for mine, theirs, extreme in ((self.low, low, torch.minimum), (self.high, high, torch.maximum)):
            for name, tensor in theirs.items():
                if tensor.is_complex():
                    continue
                mine[name] = extreme(mine[name], tensor.to(mine[name])) if name in mine else tensor.clone()

    def add_stacked(self, states: State) -> None:
        """Many clients, tensors [K, ...]."""
        real = {name: tensor for name, tensor in states.items() if not tensor.is_complex()}
        self.add({n: t.amin(0) for n, t in real.items()}, {n: t.amax(0) for n, t in real.items()})

    def kept(self, means: State, *, pooled: bool) -> dict[str, Tensor]:
        """`means`, and the entries themselves where they are equal in all clients.

        A variance that was `pooled` is theirs only where what it is about is equal as well.
        """
        found = {}
        for name, mean in means.items():
            beside = _mean_of(name) if pooled else None
            if name in self.low:
                alike = self.low[name] == self.high[name]
                if beside in self.low:
                    alike = alike & (self.low[beside] == self.high[beside])
                mean = torch.where(alike, self.low[name].to(mean.dtype), mean)  # noqa: PLW2901
            found[name] = mean
        return found


class _PooledMoments(WeightedSum):
    """Weighted sums in which a variance goes in as a second moment and comes out as a variance."""

    def add(self, state: State, weight: float) -> None:
        super().add(_with_second_moments(state, 1.0), weight)

    def mean(self) -> dict[str, Tensor]:
        return {n: t.clamp_(min=0) if _mean_of(n) else t for n, t in _with_second_moments(super().mean(), -1.0).items()}


def _mean_of(name: str) -> str | None:
    stem, dot, last = name.rpartition(".")
    return f"{stem}{dot}running_mean" if last == "running_var" else None


def _with_second_moments(state: State, sign: float) -> dict[str, Tensor]:
    """Turn variances into second moments about zero (sign 1) or back (sign -1), in float64."""
    result = {}
    for name, tensor in state.items():
        mean = _mean_of(name)
        paired = mean is not None and mean in state
        result[name] = tensor.double() + sign * state[mean].double().square() if paired else tensor.double()  # type: ignore[index]
    return result


def pool_moments(moments: Iterable[tuple[State, float]]) -> dict[str, Tensor]:
    """Batch-norm statistics of several clients as if their data were one, from ``(statistics, weight)`` pairs.

    Variance is that within clients plus that between them (law of total variance).

    Examples
    --------
    >>> one = {"running_mean": torch.tensor([0.0]), "running_var": torch.tensor([1.0])}
    >>> two = {"running_mean": torch.tensor([2.0]), "running_var": torch.tensor([1.0])}
    >>> pool_moments([(one, 1), (two, 1)])["running_var"].item()
    2.0
    """
    total = _PooledMoments()
    dtypes: dict[str, torch.dtype] = {}
    for state, weight in moments:
        total.add(state, weight)
        dtypes.update({name: accumulator_dtype(tensor.dtype) for name, tensor in state.items()})
    return {name: tensor.to(dtypes[name]) for name, tensor in total.mean().items()}
