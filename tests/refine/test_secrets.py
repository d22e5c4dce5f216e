"""Masks that never repeat, and answers that are billed however they end."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import nn

import fedmerge
from fedmerge.errors import FedMergeError, InvalidOption, NoAnswer
from fedmerge.merging import build_pipeline
from fedmerge.offline.merge import asked_at_hand
from fedmerge.privacy import simulated_masks
from fedmerge.privacy.simulated_masks import Occasion, mask, masked, unmask
from fedmerge.questions import Answer, Question, respond
from fedmerge.questions.answering import summed_losses
from fedmerge.refine import Privacy, epsilon
from fedmerge.state import module_state
from fedmerge.statistics import HeadGradient, HeadSums, NoisySums
from fedmerge.statistics.sending.compression import decode
from fedmerge.tasks import AnyLoss

LONG = 4096
DELTA = 1e-5


def told(client: int, shift: float = 0.0) -> Answer:
    """A long answer, so that whatever pattern there is would show."""
    values = torch.linspace(-1, 1, LONG, dtype=torch.float64) * (client + 1) + shift
    return Answer(torch.zeros(0, dtype=torch.float64), 1, 3, {"long": {"layer": values}})


def unlike_noise(numbers: np.ndarray) -> float:
    """How improbable 64-bit numbers are if they are uniform: the least p of tests of their bits and of their bytes."""
    bits = (numbers[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    by_bit = ((bits.sum(0) - len(numbers) / 2) ** 2 / (len(numbers) / 4)).sum()
    counts = np.bincount(numbers.view(np.uint8), minlength=256)
    by_byte = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return float(min(chi2.sf(by_bit, 64), chi2.sf(by_byte, 255)))


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture
def clients() -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    return [
        [(torch.randn(n, 4, dtype=torch.float64, generator=generator), torch.arange(n) % 3)] for n in (30, 51, 12, 80)
    ]


@pytest.fixture
def sent(monkeypatch) -> list[tuple[int, simulated_masks.Masked]]:
    """What every client puts on the wire, in order."""
    found: list[tuple[int, simulated_masks.Masked]] = []

    def noted(questions, answers, client, *rest):
        found.append((client, mask(questions, answers, client, *rest)))
        return found[-1][1]

    monkeypatch.setattr(simulated_masks, "mask", noted)
    return found


NOW = Occasion(round=3, exchange=1, attempt=2)


@pytest.mark.parametrize(
    ("then", "others", "secret"),
    [
        (replace(NOW, round=4), range(4), 5),
        (replace(NOW, exchange=2), range(4), 5),
        (replace(NOW, attempt=3), range(4), 5),
        (NOW, range(3), 5),
        (NOW, range(4), 6),
    ],
    ids=["round", "exchange", "attempt", "clients", "secret"],
)
@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_masked_vectors_of_two_occasions_differ_like_fresh_noise(then, others, secret, shift):
    """Whether the sums are equal or not: nothing of either, nor of their difference, can be read off."""
    asked = [Question({})]
    one = mask(asked, [told(1)], 1, range(4), 5, NOW).values
    other = mask(asked, [told(1, shift)], 1, others, secret, then).values
    assert unlike_noise(one) > 1e-3
    assert unlike_noise(one - other) > 1e-3
    # Masks that repeat would show the difference of the sums, and the test would see it.
    again = mask(asked, [told(1, shift)], 1, range(4), 5, NOW).values
    assert unlike_noise(one - again) < 1e-100
    assert np.allclose((again - one)[4:].view(np.int64) / 2.0**simulated_masks.BITS, 3 * shift)


def test_no_merge_repeats_masks_be_it_of_the_same_seed_and_round(net, clients, sent):
    """As where a round is run again after an interruption, or two strategies with one seed run side by side."""
    pipeline = build_pipeline("fedavg+logistic_head", privacy=Privacy(masks=True))
    updates = [fedmerge.ClientUpdate(i, module_state(net)[0], 1.0) for i in range(4)]
    states = []
    for number in (1, 1, 2):
        context = fedmerge.MergeContext(ask=asked_at_hand(net, clients), round=number, seed=7)
        states.append(pipeline.merge(updates, context).state)
    assert all(torch.equal(states[0][name], one[name]) for one in states for name in states[0])
    mine = [one.values for client, one in sent if client == 2]
    assert len(mine) >= 6
    values = np.concatenate(mine)
    assert len(np.unique(values)) == len(values)
    assert len({one.occasion for client, one in sent if client == 2}) == 2 * len(mine) // 3
    third = len(mine) // 3
    first, second, last = (np.concatenate(mine[i : i + third]) for i in (0, third, 2 * third))
    for one, other in ((first, second), (first, last), (second, last)):
        assert unlike_noise(one - other) > 1e-9  # the operating system's noise is another every time


def test_a_late_first_answer_is_not_opened(net, clients, sent, caplog):
    """It would be the one number by which the sum of all differs from the sum that was opened."""
    asked = Question(module_state(net)[0], needs=(HeadSums(),))
    late: list[tuple[int, list[Answer]]] = []

    def ask(questions, numbers):
        found = asked_at_hand(net, clients)(questions, numbers)
        arrived = [*late, *(one for one in found if one[0] != 2)]
        late.extend(one for one in found if one[0] == 2)
        return arrived

    ((_, given),) = masked(ask)([asked], range(4))
    assert [client for client, _ in sent] == [0, 1, 3, 0, 1, 3]
    assert "client 2: an answer that nobody waits for is not opened" in caplog.text
    assert given[0].examples == sum(len(clients[i][0][0]) - -(-len(clients[i][0][0]) // 10) for i in (0, 1, 3))


def test_what_has_masks_of_another_attempt_is_not_added_up():
    asked = [Question({})]
    first = [mask(asked, [told(i)], i, range(3), 5, Occasion(1, 0, 0)) for i in range(3)]
    again = [mask(asked, [told(i)], i, (0, 1), 5, Occasion(1, 0, 1)) for i in range(2)]
    assert unmask(again, asked)[0].clients == 2
    with pytest.raises(FedMergeError, match="2 occasions do not add up"):
        unmask([*again, first[2]], asked)


def test_an_answer_given_twice_counts_once(net, clients):
    asked = Question(module_state(net)[0], needs=(HeadSums(),))

    def ask(questions, numbers):
        found = asked_at_hand(net, clients)(questions, numbers)
        return [*found, (1, [replace(found[1][1][0], examples=10**6)])]

    ((_, given),) = masked(ask)([asked], range(4))
    assert given[0].clients == 4
    assert given[0].examples < 200


def merged(net, ask, method="fedavg+ridge_head", **privacy):
    pipeline = build_pipeline(method, privacy=Privacy(**privacy))
    updates = [fedmerge.ClientUpdate(i, module_state(net)[0], 1.0) for i in range(4)]
    return pipeline.merge(updates, fedmerge.MergeContext(ask=ask))


def test_answers_asked_again_are_billed(net, clients):
    """The others answered twice, and the server has had both."""
    exchanges = []

    def ask(questions, numbers):
        exchanges.append(len(questions))
        found = asked_at_hand(net, clients)(questions, numbers)
        return [one for one in found if one[0] != 3 or len(exchanges) > 2]

    result = merged(net, ask, masks=True, noise=NoisySums(2.5, 4.0, sharers=2))
    assert exchanges == [1, 1, 1]  # the sums twice, for client 3 was silent at first, and the judgement
    assert result.answers == 3
    assert [one.answers for one in result.exchanges] == [1, 1]


def test_a_client_that_always_fails_costs_the_others_one_answer_a_merge(net, clients):
    asked = []

    def ask(questions, numbers):
        asked.append(list(numbers))
        return [one for one in asked_at_hand(net, clients)(questions, numbers) if one[0] != 3]

    result = merged(net, ask, masks=True)
    assert asked == [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2]]
    assert result.answers == 3


@pytest.mark.parametrize("hidden", [True, False])
def test_answers_of_which_nothing_came_are_billed(net, clients, caplog, hidden):
    """Under masks those of three clients are thrown away where the fourth is needed; or nobody's can be read."""

    def ask(questions, numbers):
        found = asked_at_hand(net, clients)(questions, numbers)
        return found[:3] if hidden else [(i, []) for i, _ in found]

    result = merged(net, ask, masks=hidden, noise=NoisySums(2.5, 4.0, sharers=4 if hidden else 1))
    assert result.answers == 1
    assert not result.exchanges
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in result.state.items())
    assert "the merged model is refined no further" in caplog.text


def test_clients_that_are_gone_end_no_merge_and_too_few_from_the_start_are_refused(net, clients):
    with pytest.raises(NoAnswer, match="1 clients are left to ask under masks"):
        masked(asked_at_hand(net, clients))([Question(module_state(net)[0])], [1])
    noise = NoisySums(2.5, 4.0, sharers=5)
    with pytest.raises(InvalidOption, match="4 clients take part, and 5 are needed"):
        fedmerge.merge([net] * 4, "fedavg+ridge_head", clients=clients, privacy=Privacy(masks=True, noise=noise))
    with pytest.raises(InvalidOption, match="1 clients take part, and 2 are needed"):
        fedmerge.merge([net], "fedavg+ridge_head", clients=clients[:1], privacy=Privacy(masks=True))


def test_epsilon_of_answers_asked_again_is_the_accountants_of_all_that_were_given(net, clients):
    accountants = pytest.importorskip("opacus.accountants")
    accountant, noise = accountants.RDPAccountant(), NoisySums(2.5, 3.0, sharers=2)
    silent: list[int | None] = [3, None, 1, None, None, None]  # who does not answer, exchange by exchange

    def ask(questions, numbers):
        for _ in questions:
            accountant.step(noise_multiplier=noise.noise_multiplier, sample_rate=1.0)
        gone = silent.pop(0)
        return [one for one in asked_at_hand(net, clients)(questions, numbers) if one[0] != gone]

    answers = sum(merged(net, ask, masks=True, noise=noise).answers for _ in range(2))
    assert (answers, silent) == (6, [])
    assert epsilon(3.0, answers, DELTA) == pytest.approx(accountant.get_epsilon(delta=DELTA), rel=1e-9)


@pytest.mark.parametrize("privacy", [Privacy(masks=True), Privacy(noise=NoisySums(1.0, 1.0))])
def test_exact_batch_norm_moments_beside_protected_answers_are_refused(privacy):
    with pytest.raises(InvalidOption, match='batch_norm = "recalibrate" has every client send exact means'):
        build_pipeline("fedavg+ridge_head", privacy=privacy, batch_norm="recalibrate")
    for other in ("mean", "pooled", "local"):
        assert build_pipeline("fedavg+ridge_head", privacy=privacy, batch_norm=other).batch_norm == other
    assert build_pipeline("fedavg+recalibrate", privacy=Privacy(masks=True)).refinements
    with pytest.raises(InvalidOption, match="'batch_norm_sums' cannot be sent with noise"):
        build_pipeline("fedavg+recalibrate", privacy=Privacy(noise=NoisySums(1.0, 1.0)))


def test_an_example_whose_loss_is_far_below_zero_changes_a_sum_no_more_than_one_far_above(net):
    x, y = torch.zeros(3, 4, dtype=torch.float64), torch.tensor([1e6, -1e6, float("nan")], dtype=torch.float64)
    task = AnyLoss(lambda outputs, targets: targets.sum() + 0 * outputs.sum())
    each = [
        float(summed_losses(net, [lambda: net], [(x[i : i + 1], y[i : i + 1])], set(), 4.0, task)[0]) for i in range(3)
    ]
    assert each == [4.0, -4.0, 4.0]


@pytest.mark.parametrize("kind", [HeadSums(clip=2.0), HeadGradient(clip=2.0)])
def test_an_example_whose_features_overflow_adds_no_more_than_any_other(kind):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    x, y = torch.tensor([[0.1, 0.2], [0.0, 0.1], [3e38, 3e38]]), torch.tensor([0, 1, 2])
    clean = kind.measure(model, [(x[:1] * 0, y[:1])], None)
    found = kind.measure(model, [(x, y)], None)
    for name, tensor in found.items():
        assert bool(tensor.isfinite().all()), name
        assert float(tensor.norm()) <= kind.bounds()[name.rpartition(".")[2]] + 1e-9
        assert clean[name].dtype == torch.float64  # rounded once there is noise, not before


def test_sums_are_not_rounded_before_there_is_noise():
    """The rounding of a mean over many examples adds to what one of them changes."""
    model, kind = nn.Linear(2, 2, bias=False).float(), HeadSums(clip=1.0)
    for n in (200_000, 170_001, 123_457, 99_991):
        x, y = torch.ones(n, 2, dtype=torch.float32), torch.zeros(n, dtype=torch.long)
        silent = torch.cat([x[1:], x[:1] * 0])
        whole, without = (kind.measure(model, [(one, y)], None)["weight.S"].double() for one in (x, silent))
        assert n * float((whole - without).norm()) <= 1.0 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noisy_sums_travel_in_the_dtype_of_plain_ones(dtype):
    model = nn.Linear(2, 2).to(dtype)
    batch = [(torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).to(dtype), torch.arange(40) % 2)]
    asked = Question(module_state(model)[0], needs=(HeadSums(),))
    plain, noisy = (
        decode(respond(one, model, batch).statistics["head_sums"])
        for one in (asked, replace(asked, noise=NoisySums(1.0, 1.0)))
    )
    assert {n: t.dtype for n, t in noisy.items()} == {n: t.dtype for n, t in plain.items()}


def test_the_seed_of_masks_is_nobodys_to_know(net, clients, sent, caplog):
    """Not the run's: whoever reads a configuration could take the masks off again."""
    caplog.set_level(logging.INFO)
    asked = Question(module_state(net)[0], needs=(HeadSums(),))
    for _ in range(2):
        masked(asked_at_hand(net, clients))([asked], range(4))
    assert (sent[0][1].values != sent[4][1].values).all()
    assert not any(str(value) in caplog.text for value in sent[0][1].values)


@pytest.mark.parametrize("clients", [2, 3, 5])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sums_fit_under_masks_up_to_a_bound_and_are_refused_beyond(clients, sign):
    """Sums are multiples of 2**-32 modulo 2**64, half of it negative: with a bit to spare all may add up to 2**30."""
    bound = 2.0**30 / clients
    asked, everybody = [Question({}, points=((0.0,), (1.0,)))], range(clients)

    def answered(number, losses=(0.0, 0.0)):
        value = torch.tensor([number], dtype=torch.float64)
        return [Answer(torch.tensor(losses, dtype=torch.float64), 1, 1, {"own": {"sum": value}})]

    most = np.nextafter(bound, 0) // 1  # whole, so that fixed point rounds nothing
    sent = [mask(asked, answered(sign * most), i, everybody, 5) for i in everybody]
    assert float(unmask(sent, asked)[0].statistics["own"]["sum"]) == sign * most  # a mean over as many examples
    with pytest.raises(InvalidOption, match=re.escape(f"sums beyond {bound:g}")):
        mask(asked, answered(sign * 1.001 * bound), 0, everybody, 5)
    # A point that diverged at every client is not chosen: its sum is the largest that there is, and still positive.
    sent = [mask(asked, answered(0.0, (1.5, float("inf"))), i, everybody, 5) for i in everybody]
    assert unmask(sent, asked)[0].losses.tolist() == pytest.approx([1.5 * clients, 2.0**30])
