"""One client's model, number of examples, widths or later answers: they neither end a round nor decide it for all."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from fedmerge import ClientUpdate, MergeContext
from fedmerge.aggregators.fedma import FedMA
from fedmerge.matching.assignment import assign
from fedmerge.matching.fairness import anchor_of, bounded, normalised, shares_of, typical
from fedmerge.matching.growing import class_weighted
from fedmerge.matching.optimal_transport import coupling
from fedmerge.merging import build_pipeline
from fedmerge.merging.repair import Rescale
from fedmerge.questions.stages import catch_up
from fedmerge.state import LARGEST, module_state
from fedmerge.strategies.travel import facts_of
from tests.matching.hostile_models import (
    WIDTH,
    X,
    Y,
    changed,
    equal_neurons,
    flipped,
    network,
    noise,
    normed,
    of_two_axes,
    one_direction,
    shuffled,
    signs,
    tied_layers,
    two_groups,
)

METHODS = (
    "rebasin",
    "rebasin(ground=activations,combine=median)",
    "c2m3",
    "gamf(combine=trimmed_mean)",
    "zipit",
    "cca(combine=median)",
    "otfusion(importance=l1,fusion=barycentre)",
    "otfusion(solver=sinkhorn,regularization=0.2)",
    "otfusion(ground=activations)",
    "pfnm",
    "pfnm(class_aware=false,combine=median)",
    "fedma",
)
KINDS = {
    "at the bound, both signs": changed(lambda t: LARGEST * signs(t)),
    "one entry at the bound": changed(
        lambda t: torch.where(torch.arange(t.numel()).reshape(t.shape) == 0, -LARGEST, t)
    ),
    "hundreds of times as large": changed(lambda t: 900 * signs(t)),
    "last layer at the bound": lambda s: {n: LARGEST * signs(t) if n.startswith("5") else t for n, t in s.items()},
    "all zero": changed(torch.zeros_like),
    "neurons all equal": equal_neurons,
    "all neurons point one way": one_direction,
    "a dead layer": lambda s: {n: torch.zeros_like(t) if n.startswith("3") else t for n, t in s.items()},
    "silent everywhere": lambda s: {n: t - 1e3 if n.endswith("bias") else t for n, t in s.items()},
    "subnormal": changed(lambda t: 1e-42 * signs(t)),
    "tiny": changed(lambda t: 1e-25 * t),
    "every other tensor huge, the rest tiny": lambda s: {
        n: t * (1e14 if i % 2 else 1e-37) if t.is_floating_point() else t for i, (n, t) in enumerate(s.items())
    },
    "signs of neurons turned": flipped,
    "the same model": dict,
}
COUNTS = {0: [5, 4, 6], 1: [4, 4, 9], 2: [7, 1, 8], 3: [5, 5, 5], 4: [6, 6, 3]}


def sent(states, weights=None):
    """Clients with these models, numbered as they come."""
    counts = [{"class_counts": {"class_counts": torch.tensor(COUNTS[i])}} for i in range(len(states))]
    return [ClientUpdate(i, s, 20.0 if weights is None else weights[i], counts[i]) for i, s in enumerate(states)]


def trained_on(update, news, stage):
    """What a client answers at a later stage: all that it may train moved a little."""
    state = catch_up(update.state, news)
    return {n: t + 0.01 if n not in stage.frozen and t.is_floating_point() else t for n, t in state.items()}


class Reached:
    """Clients that answer FedMA's later exchanges; `lie` changes what one of them answers."""

    def __init__(self, updates, liar=None, lie=None):
        self.kept, self.liar, self.lie, self.asked = {u.client: u for u in updates}, liar, lie, []

    def __call__(self, told, stage):
        answers = []
        self.asked.append(sorted(told))
        for client, news in told.items():
            state = trained_on(self.kept[client], news, stage)
            self.kept[client] = ClientUpdate(client, state, 20.0)
            answer = ClientUpdate(client, {n: state[n] for n in stage.send}, 20.0)
            answers += self.lie(answer) if client == self.liar else [answer]
        return answers


def merged(method, updates, model=network, exchange=None, inputs=X, **settings):
    base, buffers = module_state(model())
    context = MergeContext(
        base, seed=0, data=[(inputs, Y)], example=X[:2], model_fn=model, exchange=exchange, **facts_of(model())[1]
    )
    pipeline = build_pipeline(method, **{"repair": "none", **settings})
    return pipeline.merge(updates, context, buffers=buffers)


def finite(state):
    return all(bool(t.isfinite().all()) for t in state.values() if t.is_floating_point())


def same(one, two):
    return list(one) == list(two) and all(torch.equal(one[n], two[n]) for n in one)


def honest(number=4, model=network):
    return [module_state(model(10 + seed))[0] for seed in range(number)]


def with_hostile(states, place, hostile, weight=20.0):
    """Updates with one more at this place, and the same without it."""
    updates = sent([*states[:place], hostile, *states[place:]], [20.0] * place + [weight] + [20.0] * 5)
    return updates, [u for u in updates if u.client != place]


@pytest.mark.parametrize(
    ("method", "kind"), [(m, k) for i, m in enumerate(METHODS) for j, k in enumerate(KINDS) if (i + j) % 3 == 0]
)
def test_a_hostile_model_ends_no_round_and_is_left_out_where_it_is_dropped(method, kind):
    place = (list(KINDS).index(kind) + METHODS.index(method)) % 3 * 2  # first, middle, last
    states = honest()
    updates, without = with_hostile(states, place, KINDS[kind](states[0]))
    exchange = Reached(updates) if method == "fedma" else None
    result = merged(method, updates, exchange=exchange)
    assert finite(result.state)
    assert {u.client for u in without} <= set(result.accepted)
    assert {bad.client for bad in result.dropped} <= {place}
    if result.dropped:
        assert result.dropped[0].reason
        exchange = Reached(without) if method == "fedma" else None
        assert same(result.state, merged(method, without, exchange=exchange).state)


@pytest.mark.parametrize(("method", "weight"), list(zip(METHODS, [2.0**-60, 2.0**50] * 6, strict=True)))
def test_a_client_that_claims_next_to_no_or_endless_examples_ends_no_round(method, weight):
    states = honest()
    updates, _ = with_hostile(states, 0, noise(states[0]), weight)
    result = merged(method, updates, exchange=Reached(updates) if method == "fedma" else None)
    assert finite(result.state)
    assert set(result.accepted) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("method", ["rebasin(ground=activations)", "otfusion(ground=activations)", "cca", "zipit"])
def test_a_model_that_overflows_on_the_servers_data_is_dropped(method, place):
    states = honest()
    updates, without = with_hostile(states, place, changed(lambda t: 900 * signs(t))(states[1]))
    result = merged(method, updates, inputs=1e15 * X)
    (bad,) = result.dropped
    assert bad.client == place
    assert "server's data" in bad.reason
    assert same(result.state, merged(method, without, inputs=1e15 * X).state)


@pytest.mark.parametrize("place", [0, 4])
@pytest.mark.parametrize("method", ["otfusion", "pfnm", "fedma(retrain_epochs=0)"])
def test_a_client_far_wider_than_most_does_not_widen_the_model_for_all(method, place):
    states = honest()
    updates, without = with_hostile(states, place, module_state(network(9, 4 * WIDTH + 1))[0])
    result = merged(method, updates)
    assert [bad.client for bad in result.dropped] == [place]
    assert "most clients 6" in result.dropped[0].reason
    assert same(result.state, merged(method, without).state)
    updates, _ = with_hostile(states, place, module_state(network(9, 4 * WIDTH))[0])
    assert not merged(method, updates).dropped


@pytest.mark.parametrize("method", ["otfusion", "pfnm"])
def test_blocks_of_another_size_are_that_clients_problem(method):
    states = honest(model=two_groups)
    updates, without = with_hostile(states, 0, module_state(two_groups(9, 8))[0])
    result = merged(method, updates, two_groups)
    assert [bad.client for bad in result.dropped] == [0]
    assert "blocks" in result.dropped[0].reason
    assert same(result.state, merged(method, without, two_groups).state)


@pytest.mark.parametrize("kind", ["noise", "hundreds of times as large", "neurons all equal", "all zero"])
@pytest.mark.parametrize("method", ["rebasin", "otfusion", "gamf", "c2m3", "pfnm"])
def test_honest_neurons_are_matched_with_each_other_whoever_comes_first_and_claims_most(method, kind):
    one = module_state(normed(0, 16))[0]
    states = [one, *(shuffled(one, seed) for seed in range(3))]
    updates, _ = with_hostile(states, 0, (KINDS | {"noise": noise})[kind](one), 2.0**50)
    options = "combine=median,max_width=1" if method == "pfnm" else "combine=median"
    result = merged(f"{method}({options})", updates, lambda seed=0: normed(seed, 16))
    model = normed(0, 16)
    want = model(X)
    model.load_state_dict(result.state)
    # Four equal models among five leave the median at theirs; matched to other neurons, they do not.
    torch.testing.assert_close(model(X), want, rtol=1e-3, atol=1e-4)


def test_the_anchor_is_typical_and_not_who_claims_the_most():
    good = [module_state(network(seed, 16))[0] for seed in range(4)]
    for bad in (noise, KINDS["all zero"], KINDS["neurons all equal"], KINDS["hundreds of times as large"]):
        for place in range(5):
            states = [*good[:place], bad(good[0]), *good[place:]]
            weights = [1e9 if i == place else 20.0 for i in range(5)]
            assert anchor_of(states, weights) != place
    assert 4 not in typical([*good, KINDS["all zero"](good[0])])
    assert anchor_of(good[:2], [1.0, 2.0]) == 1
    assert anchor_of([good[1], *[good[0]] * 3], [5.0, 1.0, 9.0, 2.0]) == 2


def test_nobodys_numbers_are_far_larger_than_most_where_neurons_are_compared():
    states = [{"w": torch.full((2, 2), v)} for v in (1.0, 2.0, 1e15)]
    before = [s["w"].clone() for s in states]
    assert [float(s["w"][0, 0]) for s in bounded(states)] == pytest.approx([1.0, 2.0, 6.0])
    assert all(torch.equal(s["w"], w) for s, w in zip(states, before, strict=True))
    mixed = bounded([{"w": torch.ones(2).half()}, {"w": torch.ones(2).double()}])
    assert {s["w"].dtype for s in mixed} == {torch.float64}


def test_shares_are_finite_and_nobodys_outweighs_two_usual_ones():
    assert shares_of([1.0, 1.0, 1.0, 1e300]) == pytest.approx([0.2, 0.2, 0.2, 0.4])
    for weights in ([1e308] * 5, [5e-324] * 5, [5e-324, 1e308, 1.0]):
        for found in (shares_of(weights), normalised(weights)):
            assert sum(found) == pytest.approx(1.0)
            assert min(found) > 0


def test_a_class_row_of_a_client_with_few_examples_outgrows_no_half():
    states = [{"w": torch.ones(2, 3, dtype=torch.float16)} for _ in range(2)]
    class_weighted(states, ["w"], [1e-6, 1.0], torch.tensor([[5, 0], [0, 5]]))
    assert all(finite(state) for state in states)
    assert float(states[0]["w"][0, 0]) > 65504


def test_a_client_that_is_loud_does_not_say_how_loud_the_merged_model_is():
    quiet, goals = network(0), []
    for clients in ([quiet] * 3, [of_two_axes(quiet, 1e6), *[quiet] * 3]):
        rescale = Rescale([X])
        for client in clients:
            rescale.add(client, 1.0 if client is quiet else 2.0**50)
        goals.append(rescale.finish(network(0)))
    for name, tensor in goals[0].items():
        torch.testing.assert_close(goals[1][name], tensor)


@pytest.mark.parametrize(
    "kind", ["neurons all equal", "all neurons point one way", "silent everywhere", "a dead layer"]
)
def test_cca_with_next_to_no_ridge_takes_layers_without_rank(kind):
    states = honest()
    updates, _ = with_hostile(states, 1, KINDS[kind](states[0]))
    result = merged("cca(gamma=1e-12)", updates)
    assert finite(result.state)
    assert {0, 2, 3, 4} <= set(result.accepted)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("solver", ["emd", "sinkhorn"])
def test_costs_of_any_size_are_transported_alike(solver, scale):
    cost = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masses = torch.full((5,), 0.2, dtype=torch.float64), torch.full((4,), 0.25, dtype=torch.float64)
    found, want = (coupling(one, *masses, solver, 0.01) for one in (cost * scale, cost))
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)
    assert assign(cost[:4] * scale).equal(assign(cost[:4]))


LIES = {
    "nothing": lambda a: [],
    "NaN": lambda a: [ClientUpdate(a.client, {n: t * math.nan for n, t in a.state.items()}, 20.0)],
    "beyond the bound": lambda a: [ClientUpdate(a.client, {n: t * 0 + 1e30 for n, t in a.state.items()}, 20.0)],
    "no examples": lambda a: [ClientUpdate(a.client, a.state, 0.0)],
    "layers left out": lambda a: [ClientUpdate(a.client, dict(list(a.state.items())[1:]), 20.0)],
    "frozen layers too": lambda a: [ClientUpdate(a.client, {**a.state, "0.weight": torch.ones(6, 4)}, 20.0)],
    "widths of before": lambda a: [ClientUpdate(a.client, {n: t[:2] for n, t in a.state.items()}, 20.0)],
    "integers": lambda a: [ClientUpdate(a.client, {n: t.long() for n, t in a.state.items()}, 20.0)],
    "somebody else's name": lambda a: [ClientUpdate(77, a.state, 20.0)],
}


@pytest.mark.parametrize(("lie", "liar"), list(zip(LIES, [0, 1, 3] * 3, strict=True)))
def test_a_lie_at_a_later_stage_leaves_its_client_at_what_it_sent_last(lie, liar, caplog):
    updates = sent(honest())
    reached = Reached(updates, liar, LIES[lie])
    with caplog.at_level(logging.WARNING):
        result = merged("fedma", updates, exchange=reached)
    assert finite(result.state)
    assert result.accepted == (0, 1, 2, 3)
    assert f"client {liar} stays" in caplog.text
    assert liar in reached.asked[0]
    assert all(liar not in later for later in reached.asked[1:])
    silent = merged("fedma", updates, exchange=Reached(updates, liar, LIES["nothing"]))
    assert same(result.state, silent.state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_answer_of_another_precision_is_taken_as_the_models(dtype):
    updates = sent(honest())
    reached = Reached(updates, 1, lambda a: [ClientUpdate(1, {n: t.to(dtype) for n, t in a.state.items()}, 20.0)])
    result = merged("fedma", updates, exchange=reached)
    assert finite(result.state)
    assert all(asked == [0, 1, 2, 3] for asked in reached.asked)


def test_an_answer_twice_counts_once():
    updates = sent(honest())
    twice = Reached(updates, 1, lambda a: [a, ClientUpdate(1, {n: -t for n, t in a.state.items()}, 20.0)])
    result = merged("fedma", updates, exchange=twice)
    assert same(result.state, merged("fedma", updates, exchange=Reached(updates)).state)


def test_what_is_merged_between_stages_is_combined_as_at_the_end():
    states = honest()
    updates, _ = with_hostile(states, 0, changed(lambda t: 900 * signs(t))(states[0]))
    told = []

    class Listening(Reached):
        def __call__(self, sent, stage):
            told.extend(t for news in sent.values() for t in news.settled.values())
            return super().__call__(sent, stage)

    merged("fedma(combine=median,max_width=1)", updates, exchange=Listening(updates))
    assert told
    assert max(float(t.abs().max()) for t in told) < 100
    assert FedMA(combine="median").several_exchanges


@pytest.mark.parametrize("options", ["", "(max_width=1)", "(gamma=0.01)"])
def test_tied_hidden_layers_go_through_all_stages_as_the_one_tensor_that_they_are(options):
    updates = sent(honest(3, tied_layers))
    result = merged(f"fedma{options}", updates, tied_layers, exchange=Reached(updates))
    assert result.accepted == (0, 1, 2)
    assert finite(result.state)
    assert torch.equal(result.state["second.weight"], result.state["third.weight"])
    assert len(result.state["first.weight"]) >= WIDTH
