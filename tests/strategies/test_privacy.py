"""Our strategies inside Flower's differential-privacy wrappers, and our clients behind Flower's mods."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)

from fedmerge.errors import InvalidOption, NoUsableUpdates
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import MergeStrategy, client_app, from_arrays
from tests.federation import CLIENTS, TRAINING, initial, plain_model, tiny_app, tiny_data, tiny_model

NORM = 0.09
"""Between the norms of the clients' updates: some are clipped and some are not."""
EXAMPLE = torch.zeros(2, 4)


def ours(method="fedavg", **keywords):
    return MergeStrategy(method, model_fn=plain_model, example=EXAMPLE, fraction_evaluate=0.0, **keywords)


def run(strategy, *mods, model_fn=plain_model, rounds=1):
    with SimulationGrid(tiny_app(*mods, model_fn=model_fn), CLIENTS) as grid:
        result = strategy.start(grid, initial(model_fn), num_rounds=rounds)
    return {name: tensor.double() for name, tensor in from_arrays(result.arrays).items()}


def updates():
    """What each client's training changes, and its number of examples."""
    base = plain_model().state_dict()
    with SimulationGrid(tiny_app(model_fn=plain_model), CLIENTS) as grid:
        messages = ours().configure_train(1, initial(plain_model), ConfigRecord(), grid)
        replies = list(grid.send_and_receive(messages))
    states = [from_arrays(reply.content["arrays"]) for reply in replies]
    changes = [{n: state[n].double() - base[n].double() for n in base} for state in states]
    return base, changes, [reply.content["metrics"]["num-examples"] for reply in replies]


def norm(change):
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in change.values()))


def clipped_average():
    """The average of clipped updates, and how many were clipped."""
    base, changes, examples = updates()
    factors = [min(1.0, NORM / norm(change)) for change in changes]
    shares = [n * factor / sum(examples) for n, factor in zip(examples, factors, strict=True)]
    moved = {
        n: base[n].double() + sum(share * change[n] for share, change in zip(shares, changes, strict=True))
        for n in base
    }
    return moved, sum(factor < 1 for factor in factors)


def assert_close(found, wanted):
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def fixed(kind, strategy, noise=0.0):
    return kind(strategy, noise_multiplier=noise, clipping_norm=NORM, num_sampled_clients=CLIENTS)


def adaptive(kind, strategy):
    return kind(strategy, noise_multiplier=0.0, num_sampled_clients=CLIENTS, initial_clipping_norm=NORM)


WRAPPERS = {
    "server, fixed": (lambda s: fixed(DifferentialPrivacyServerSideFixedClipping, s), ()),
    "server, adaptive": (lambda s: adaptive(DifferentialPrivacyServerSideAdaptiveClipping, s), ()),
    "client, fixed": (lambda s: fixed(DifferentialPrivacyClientSideFixedClipping, s), (fixedclipping_mod,)),
    "client, adaptive": (lambda s: adaptive(DifferentialPrivacyClientSideAdaptiveClipping, s), (adaptiveclipping_mod,)),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_fedavg_within_a_wrapper_averages_clipped_updates(kind):
    wrap, mods = WRAPPERS[kind]
    wrapper = wrap(ours())
    wanted, clipped = clipped_average()
    assert 0 < clipped < CLIENTS
    assert_close(run(wrapper, *mods), wanted)
    if "adaptive" in kind:
        assert wrapper.clipping_norm == pytest.approx(NORM * math.exp(-0.2 * (clipped / CLIENTS - 0.5)))


def test_a_wrappers_noise_is_on_top():
    np.random.seed(0)  # noqa: NPY002 - Flower's noise is of NumPy's global generator
    wrapper = fixed(DifferentialPrivacyServerSideFixedClipping, ours(), noise=2.0)
    wanted, _ = clipped_average()
    noise = torch.cat([(tensor - wanted[name]).flatten() for name, tensor in run(wrapper).items()])
    assert float(noise.std()) == pytest.approx(2.0 * NORM / CLIENTS, rel=0.3)


def test_local_privacy_clips_before_anything_leaves_a_client():
    """On a grid of ours as well, where clients usually answer without messages, which a mod would not see."""
    noiseless = LocalDpMod(clipping_norm=NORM, sensitivity=0.0, epsilon=1.0, delta=0.5)
    wanted, _ = clipped_average()
    assert_close(run(ours(), noiseless), wanted)


@pytest.mark.parametrize("method", ["fedatt", "median", "krum", "geometric_median", "fedavg+server_momentum"])
def test_what_merges_models_alone_runs_within_a_wrapper(method):
    found = run(fixed(DifferentialPrivacyServerSideFixedClipping, ours(method), noise=0.1), rounds=2)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("fedfisher", {}, "FedFisher cannot run inside .*: clients send fisher_kfac"),
        ("fisher", {}, "clients send fisher_diag"),
        ("fednova", {}, "clients send local_steps"),
        ("pfnm", {}, "clients send class_counts"),
        ("fedma", {"class_aware": False}, "asks clients again within a round"),
        ("pfnm", {"class_aware": False}, "neurons that come and go"),
        ("otfusion", {}, "neurons that come and go"),
    ],
)
def test_what_sends_or_changes_more_than_the_model_is_refused(kind, method, options, words):
    wrap, mods = WRAPPERS[kind]
    with pytest.raises(InvalidOption, match=words):
        run(wrap(ours(method, **options)), *mods)


def test_tensors_that_cannot_be_clipped_and_messages_that_go_past_the_wrapper_are_refused():
    with pytest.raises(InvalidOption, match=r"'1\.num_batches_tracked' is int64.*group norm"):
        run(fixed(DifferentialPrivacyServerSideFixedClipping, ours()), model_fn=tiny_model)
    with pytest.raises(InvalidOption, match="in a message of their own"):
        run(fixed(DifferentialPrivacyServerSideFixedClipping, ours(batch_norm="recalibrate")))


@pytest.mark.parametrize(("method", "options"), [("fedfisher", {}), ("fedma", {}), ("fedma", {"class_aware": False})])
def test_a_mod_that_refuses_what_a_method_sends_ends_the_run(method, options):
    """Rather than rounds in which every client fails and nothing is learnt."""
    mod = LocalDpMod(clipping_norm=NORM, sensitivity=0.0, epsilon=1.0, delta=0.5)
    with pytest.raises(NoUsableUpdates, match=r"expects exactly one ArrayRecord.*such as fedavg"):
        run(ours(method, **options), mod)


def test_mods_see_neither_evaluation_nor_the_question_for_the_partition():
    from flwr.app import Message, RecordDict

    mod = LocalDpMod(clipping_norm=NORM, sensitivity=0.0, epsilon=1.0, delta=0.5)
    with SimulationGrid(tiny_app(mod, model_fn=plain_model), CLIENTS) as grid:
        content = RecordDict({"arrays": initial(plain_model)})
        (judged,) = grid.send_and_receive([Message(content, dst_node_id=2, message_type="evaluate")])
        (told,) = grid.send_and_receive([Message(RecordDict(), dst_node_id=3, message_type="query.partition")])
    assert judged.content["metrics"]["num-examples"] == 4
    assert told.content["client"]["partition-id"] == 1


def test_another_strategy_around_ours_is_not_taken_for_privacy():
    class Spy(Strategy):
        def __init__(self, strategy):
            self.strategy = strategy

        def configure_train(self, *arguments):
            return self.strategy.configure_train(*arguments)

        def aggregate_train(self, *arguments):
            return self.strategy.aggregate_train(*arguments)

        def configure_evaluate(self, *arguments):
            return []

        def aggregate_evaluate(self, *arguments):
            return None

        def summary(self):
            self.strategy.summary()

    assert_close(run(Spy(ours("fedfisher"))), run(ours("fedfisher")))
    with pytest.raises(InvalidOption, match="FedFisher cannot run inside DifferentialPrivacyServerSideFixed"):
        run(fixed(DifferentialPrivacyServerSideFixedClipping, Spy(ours("fedfisher"))))


def test_a_round_whose_replies_a_wrapper_keeps_is_one_that_did_not_merge(caplog):
    """Flower's wrappers leave out a round in which a client fails; what they go around never sees a reply."""

    def data(client, total):
        if client == 1:
            raise OSError("no disk")
        return tiny_data(client, total)

    def wrapped(**keywords):
        wrapper = fixed(DifferentialPrivacyServerSideFixedClipping, ours(**keywords))
        with SimulationGrid(client_app(plain_model, data, training=TRAINING), CLIENTS) as grid:
            return wrapper.start(grid, initial(plain_model), num_rounds=2)

    with pytest.raises(NoUsableUpdates, match=r"round 1: .* handed on no replies"):
        wrapped()
    assert not wrapped(on_too_few="skip").arrays
    assert "round 2: the model stays as it is" in caplog.text
