"""Core Space: the clients' updates as small matrices between common bases, merged there by any method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fedmerge.adapters.small_cores import Cores
from fedmerge.aggregators.aggregator import Aggregator
from fedmerge.aggregators.pair_rule import PairRule
from fedmerge.errors import InvalidOption
from fedmerge.lookup.method_names import parse_method
from fedmerge.registry import build, register
from fedmerge.state import State
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["CoreSpace"]


@register("core_space", paper="arXiv:2509.17786")
@dataclass(frozen=True)
class CoreSpace(PairRule):
    """Any method of the toolbox on low-rank updates: they are merged as small cores in common bases, losing nothing.

    Panariello et al. 2025, section 4: with orthonormal bases U of all columns of the B_i and V of all rows of the A_i,
    ``s_i B_i A_i = U C_i V^T`` exactly, where C_i has at most ``sum_i r_i`` rows and columns. `combine` merges the C_i,
    and all parameters that are in no pair, as if they were a model; the result is cut to the rank of the adapter, as in
    ``flexlora``, to which ``combine=fedavg`` is equal. Task vectors are taken from the pair that was sent out, which
    lies in the bases too; adapters at hand without one are task vectors themselves. Ranks may be unequal.

    Parameters
    ----------
    combine
        What merges the cores: an aggregator that needs nothing but models, options in parentheses, such as
        ``"ties(density=0.2)"``, ``"tsv_m"`` or ``"median"``.

    Examples
    --------
    >>> sent = [{"lora_A.weight": torch.ones(1, 2), "lora_B.weight": torch.ones(2, 1) * i} for i in (1.0, 2.0, 9.0)]
    >>> updates = [ClientUpdate(i, s) for i, s in enumerate(sent)]
    >>> merged, _ = CoreSpace("median").merge(updates, MergeContext(), {})
    >>> bool((merged["lora_B.weight"] @ merged["lora_A.weight"] - 2).abs().max() < 1e-5)
    True
    """

    combine: str = "fedavg"

    def __post_init__(self) -> None:
        super().__post_init__()
        inner, name = self.combiner, f"core_space: combine = {self.combine!r}"
        if isinstance(inner, PairRule):
            raise InvalidOption(f"{name} merges pairs itself: name a method that merges any tensors, such as ties")
        if inner.needs or inner.requires_model or inner.requires_data or inner.local_rule or inner.several_exchanges:
            raise InvalidOption(
                f"{name} needs more of clients or of the model than tensors, and cores are no layers of it: name one "
                "that works on any tensors, such as ties, median or tsv_m"
            )

    @cached_property
    def combiner(self) -> Aggregator:
        """The aggregator that `combine` names."""
        name, *steps = parse_method(self.combine)
        if steps:
            raise InvalidOption(f"combine = {self.combine!r}: server steps stand behind the whole method, not in it")
        made: Aggregator = build("aggregator", name.name, name.options)
        return made

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Merge the cores, and all else with them."""
        given = self.given(updates, context)
        factors = {name for pair in given.pairs for name in (pair.a, pair.b)}
        base = None if context.base is None else {n: t for n, t in context.base.items() if n not in factors}
        if base is None and all(name in factors for name in given.updates[0].state):
            base = {}
        states = [{n: t for n, t in update.state.items() if n not in factors} for update in given.updates]
        spaces = {}
        for pair in given.pairs:
            start = given.start(pair)
            terms = given.terms(pair)
            cores = spaces[pair] = Cores(terms if start is None else [*terms, start])
            for i, state in enumerate(states):
                state[pair.a] = cores.of(i).to(terms[i].a.dtype)
            if base is not None:
                core = cores.of(len(terms)) if start is not None else torch.zeros_like(cores.of(0))
                base[pair.a] = core.to(terms[0].a.dtype)
        inner = [replace(update, state=state) for update, state in zip(given.updates, states, strict=True)]
        found, kept = self.combiner.merge(inner, replace(context, base=base), memory)
        merged: dict[str, Tensor] = dict(found)
        for pair, cores in spaces.items():
            b, a = cores.factors(merged.pop(pair.a).double(), given.rank(pair))
            merged |= pair.tensors(b, a, like=given.updates[0].state)
        return merged, kept
