"""Laws of hostile clients: whatever one sends, first, amid the others or last, the round ends with a model to go on
from, and the others are in it."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch

from fedmerge import ClientUpdate, MergeContext
from fedmerge.state import LARGEST
from tests.contract.laws import Known, answering, base
from tests.contract.table import ROWS
from tests.federation import noisy_states
from tests.hostile.kind import Kind, table
from tests.hostile.kinds import STATES, WEIGHTS, hostile_update

CLIENTS = 5
PLACES = {"first": 0, "amid": 2, "last": CLIENTS - 1}
EXAMPLES = (5.0, 1.0, 14.0, 3.0, 7.0)


def _told(name, weight, must_drop=True):
    return Kind(name, "weight", lambda rng, honest, _: weight, must_drop)


def _holding(name, make, must_drop=True):
    def put(rng, state, model):
        chosen = [n for n in state if n.endswith("weight") and state[n].ndim == 2][:1]
        return {**state, **{n: make(state[n]) for n in chosen}}

    return Kind(name, "state", put, must_drop)


def _strided(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


OWN = {
    **table(
        "weight",
        _told("a text", "12"),
        _told("nothing", None),
        _told("a list", [5]),
        _told("a whole number without end", 10**400),
        _told("true", True, must_drop=False),
        _told("a tensor", torch.tensor(3.0), must_drop=False),
    ),
    **table(
        "state",
        _holding("a list", lambda t: t.tolist()),
        _holding("an array", lambda t: t.numpy()),
        _holding("sparse", lambda t: t.to_sparse()),
        _holding("without data", lambda t: t.to("meta")),
        _holding("unsigned, of 16 bits", lambda t: t.abs().to(torch.uint16)),
        _holding("of eight bits, floating", lambda t: t.to(torch.float8_e4m3fn), must_drop=False),
        _holding("a parameter", lambda t: torch.nn.Parameter(t.clone()), must_drop=False),
        _holding("one number, expanded", lambda t: torch.full((1, 1), 0.25).expand(t.shape), must_drop=False),
        _holding("every other number of another", _strided, must_drop=False),
        _holding("in columns", lambda t: t.T.contiguous().T, must_drop=False),
        _holding("a thousand times as large", lambda t: 1e3 * t / t.abs().max(), must_drop=False),
        _holding("a million times as large", lambda t: 1e6 * t / t.abs().max()),
        _holding("minus zeros", lambda t: -torch.zeros_like(t), must_drop=False),
    ),
    **table(
        "flags",
        *(
            Kind(f"flags {f}", "state", lambda rng, s, m, f=f, d=d: {**s, "seen": torch.tensor(f, dtype=d)}, drop)
            for f, d, drop in (
                ([5, -1], torch.int64, True), ([0.5, 1.0], torch.float32, True), ([1, 0], torch.uint8, False),
                ([True, True], torch.bool, False),
            )
        ),
    ),
}  # fmt: skip
KINDS = [
    *STATES.values(),
    *WEIGHTS.values(),
    *(replace(k, place="state") if k.place == "flags" else k for k in OWN.values()),
]
SHARE, SELDOM = 5, 40
"""Every so manieth kind in every run of the tests, by each method others; of those that take their time, fewer."""
ROW = pytest.mark.parametrize("number", [pytest.param(i, id=str(row)) for i, row in enumerate(ROWS)])


class Federation:
    """Five clients that have trained, and a method that merges them."""

    def __init__(self, row):
        self.row, self.pipeline, self.model = row, row.pipeline(), base()
        states = [{**s, "temperature": torch.tensor(1.5 + i), "seen": torch.tensor([i == 0, False])}
                  for i, s in enumerate(noisy_states(CLIENTS))]  # fmt: skip
        states = [{**state, **{name: self.model[name] for name in row.held}} for state in states]
        self.honest = [ClientUpdate(i, s, EXAMPLES[i], row.statistics(i, s)) for i, s in enumerate(states)]
        self._without = {}

    def merged(self, sent, start=None, memory=None, round=1):
        asked = {"ask": answering(self.honest)} if self.row.asks else {}
        context = MergeContext(base=start or self.model, seed=1, round=round, **self.row.known(Known), **asked)
        return self.pipeline.merge(sent, context, memory)

    def without(self, place):
        if place not in self._without:
            self._without[place] = self.merged([update for update in self.honest if update.client != place]).state
        return self._without[place]

    def check_round(self, kind, place):
        """A round in which one client lies, and where that was taken, one more in which nobody does."""
        sent = list(self.honest)
        sent[place] = hostile_update(kind, random.Random(place), sent[place], self.model)
        if sent[place] is None:
            return
        result = self.merged(sent)
        if place not in result.accepted:
            left = self.without(place)
            assert all(torch.equal(tensor, left[name]) for name, tensor in result.state.items()), "had its say"
            assert result.dropped[0].client == place
            assert result.dropped[0].reason
            return
        grown = kind.wide and self.pipeline.aggregator.may_change_width
        assert not kind.must_drop or grown, "taken"
        if grown:  # honestly so: the wider model is merged with the others
            assert result.accepted == tuple(range(CLIENTS)), result.dropped
            assert all(bool(tensor.isfinite().all()) for tensor in result.state.values())
            return
        self._check_goes_on(result)
        again = self.merged([self._moved(u, result.state) for u in self.honest], result.state, result.memory, 2)
        self._check_goes_on(again)

    def _moved(self, update, start):
        """What an honest client makes of another start: the same steps from there."""
        steps = update.state.items()
        return replace(
            update,
            state={
                n: start[n]
                if n in self.row.held_next
                else t
                if t.dtype == torch.bool
                else start[n] + (t - self.model[n])
                for n, t in steps
            },
        )

    def _check_goes_on(self, result):
        """A model of the form sent, which clients can train on from, and all have their part in it."""
        assert result.accepted == tuple(range(CLIENTS)), result.dropped
        for name, want in self.model.items():
            tensor = result.state[name]
            assert (tensor.dtype, tensor.shape, tensor.requires_grad) == (want.dtype, want.shape, False), name
            assert not tensor.is_floating_point() or float(tensor.abs().max()) <= LARGEST, name
        assert bool((result.state["1.running_var"] >= 0).all())
        assert 0 <= int(result.state["1.num_batches_tracked"]) < 20_000_000
        for name, tensor in result.memory.items():
            assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), name


def faults(number, kinds, places):
    federation, found = Federation(ROWS[number]), []
    for i, kind in enumerate(kinds):
        for place in places[i % len(places)]:
            try:
                federation.check_round(kind, place)
            except Exception as error:
                found.append(f"{kind}, client {place} of {CLIENTS}: {type(error).__name__}: {error}")
    return found


@ROW
def test_no_kind_of_client_ends_a_round(number):
    row = ROWS[number]
    step = SELDOM if row.traces or row.method in ("geometric_median", "maecho", "fedfisher") else SHARE
    places = [(place,) for place in PLACES.values()]
    found = faults(number, KINDS[number % step :: step], places)
    assert not found, "\n".join(found)


@pytest.mark.study
@ROW
def test_no_kind_of_client_ends_a_round_wherever_it_stands(number):
    found = faults(number, KINDS, [tuple(PLACES.values())])
    assert not found, "\n".join(found)


@cache
def averaging():
    return Federation(ROWS[0])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_where_it_stands_does_not_matter(kind, place):
    averaging().check_round(kind, PLACES[place])
