"""Masks, clipping and noise of what clients answer, and that sums give what the pooled data would."""

from __future__ import annotations

import copy
from dataclasses import replace
from math import exp, sqrt

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import nn
from torch.nn import functional as F

import fedmerge
from fedmerge.errors import FedMergeError, InvalidOption
from fedmerge.merging import build_pipeline
from fedmerge.offline.merge import asked_at_hand
from fedmerge.privacy.simulated_masks import BITS, mask, masked, unmask
from fedmerge.questions import Question, pooled, respond
from fedmerge.refine import NaturalGradient, Privacy, RidgeHead, epsilon
from fedmerge.refine.second_order import natural_direction
from fedmerge.state import module_state
from fedmerge.statistics import FisherKfac, HeadGradient, HeadSums, LossGradient, NoisySums

CLASSES, WIDTH = 3, 5


def examples(client: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(client)
    x = torch.randn(n, 4, dtype=torch.float64, generator=generator) + client
    return x, (x @ torch.linspace(-1, 1, 12, dtype=torch.float64).sin().view(4, CLASSES).cos()).argmax(1)


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double()


@pytest.fixture
def clients() -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    return [[examples(client, n)] for client, n in enumerate((30, 51, 12, 80))]


def question(net: nn.Module, **fields: object) -> Question:
    base = module_state(net)[0]
    step = {name: torch.ones_like(tensor) for name, tensor in base.items()}
    return Question(base, (step,), ((0.0,), (0.1,)), needs=(HeadSums(), LossGradient()), **fields)


def test_the_ridge_head_is_the_centralised_ridge_classifier_of_the_pooled_features(net, clients):
    (step,) = RidgeHead(ridge=1e-2).steps({})
    # Every example is measured where none is held out, as it would be where data is in one place.
    everything = Question(module_state(net)[0], needs=step.needs(), holdout=10**9)
    kept = [[(torch.cat([x[:1], x]), torch.cat([y[:1], y]))] for ((x, y),) in clients]  # the first judges
    (total,) = pooled([everything], asked_at_hand(net, kept)([everything], range(4)))
    proposal, _ = step.propose(module_state(net)[0], total.statistics, {})
    x, y = (torch.cat([pair[i] for (pair,) in clients]) for i in (0, 1))
    features = torch.cat([net[:2](x), torch.ones(len(x), 1, dtype=torch.float64)], dim=1).detach()
    labels = torch.cat([F.one_hot(y, CLASSES).double(), torch.zeros(WIDTH + 1, CLASSES, dtype=torch.float64)])
    scales = len(proposal.points) // 3
    # Three ridges, for examples that judge to choose from; the first point of each has the classifier's own scale.
    for times, point in zip((1, 10, 100), proposal.points[1::scales], strict=True):
        found = everything.point(None)
        for factor, direction in zip(point, proposal.directions, strict=True):
            for name, tensor in direction.items():
                found[name] = found[name] + factor * tensor
        ridge = times * 1e-2 * features.square().sum() / (WIDTH + 1)
        # Least squares of the features with the ridge's rows below them: another road to the same classifier.
        rows = torch.cat([features, ridge.sqrt() * torch.eye(WIDTH + 1, dtype=torch.float64)])
        central = torch.linalg.lstsq(rows, labels).solution.T
        ours = torch.cat([found["2.weight"], found["2.bias"][:, None]], dim=1)
        assert (ours - central).abs().max() < 1e-6 * central.abs().max()


def test_the_natural_gradient_step_of_a_softmax_model_is_the_one_computed_centrally(clients):
    torch.manual_seed(1)
    model = nn.Linear(4, CLASSES).double()
    state = module_state(model)[0]
    kinds = (LossGradient(), FisherKfac(estimator="exact"))
    asked = Question(state, needs=kinds, holdout=10**9)
    kept = [[(torch.cat([x[:1], x]), torch.cat([y[:1], y]))] for ((x, y),) in clients]
    (total,) = pooled([asked], masked(asked_at_hand(model, kept), 3)([asked], range(4)))
    sums = total.statistics
    ours = natural_direction(state, sums["loss_gradient"], sums["fisher_kfac"], 0.1)
    x, y = (torch.cat([pair[i] for (pair,) in clients]) for i in (0, 1))
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    p = model(x).softmax(1).detach()
    gradient = (p - F.one_hot(y, CLASSES)).T @ rows / len(x)
    inner, outer = rows.T @ rows / len(x), (torch.diag(p.sum(0)) - p.T @ p) / len(x)
    damped = [f + sqrt(0.1) * f.diagonal().mean() * torch.eye(len(f), dtype=f.dtype) for f in (outer, inner)]
    # (A (x) G)^-1 of the flattened gradient: Newton's step, were the curvature that Kronecker product.
    central = -torch.linalg.solve(torch.kron(damped[0], damped[1]), gradient.flatten()).reshape(gradient.shape)
    together = torch.cat([ours["weight"], ours["bias"][:, None]], dim=1)
    assert (together - central).abs().max() < 1e-6 * central.abs().max()


def test_sums_under_masks_are_the_plain_sums(net, clients):
    ask, asked = asked_at_hand(net, clients), question(net)
    (plain,) = pooled([asked], ask([asked], range(4)))
    ((_, given),) = masked(ask, 7)([asked], range(4))
    (hidden,) = pooled([asked], [(0, given)])
    assert (hidden.examples, hidden.judged, hidden.clients) == (plain.examples, plain.judged, 4)
    rounding = 4 * 2.0 ** -(BITS + 1) + 1e-12  # half a unit of each client
    assert (hidden.losses - plain.losses).abs().max() <= rounding
    for kind, value in plain.statistics.items():
        for name, tensor in value.items():
            assert (hidden.statistics[kind][name] - tensor).abs().max() <= rounding / plain.examples, name


def test_a_single_masked_answer_is_uniform_whatever_it_says(net, clients):
    asked = question(net)
    answers = [respond(asked, net, one) for one in clients]
    # A long answer, so that what little correlation there is would show.
    long = {"layer": torch.linspace(-1, 1, 20_000, dtype=torch.float64)}
    answers = [replace(answer, statistics={"long": long}) for answer in answers]
    sent = [mask([asked], [answer], i, range(4), 5) for i, answer in enumerate(answers)]
    plain = np.linspace(-1, 1, 20_000)
    hidden = sent[1].values[-20_000:].astype(np.float64) / 2.0**64
    assert abs(np.corrcoef(plain, hidden)[0, 1]) < 4 / sqrt(20_000)
    assert abs(np.histogram(hidden, 10, (0, 1))[0] / 2000 - 1).max() < 0.12
    # Even all but one together are noise, and it takes the last one to see anything.
    without = unmask(sent[:3], [asked])[0].statistics
    assert "long" in without
    assert abs(np.corrcoef(plain, without["long"]["layer"].numpy())[0, 1]) < 4 / sqrt(20_000)
    whole = unmask(sent, [asked])[0].statistics["long"]["layer"]
    assert (whole - long["layer"]).abs().max() < 1e-9
    # The next exchange has other masks.
    again = mask([asked], [answers[1]], 1, range(4), 6)
    assert (again.values != sent[1].values).all()


def test_where_a_client_fails_under_masks_the_others_are_asked_again(net, clients, caplog):
    asked, exchanges = question(net), []

    def ask(questions, numbers):
        exchanges.append(list(numbers))
        found = asked_at_hand(net, clients)(questions, numbers)
        broken = [
            (i, [replace(one, losses=one.losses[:1]) for one in given] if i == 3 else given) for i, given in found
        ]
        return [(i, given) for i, given in broken if i != 2]

    ((_, given),) = masked(ask, 0)([asked], range(4))
    assert exchanges == [[0, 1, 2, 3], [0, 1]]
    assert "clients [2, 3] failed under masks" in caplog.text
    (plain,) = pooled([asked], asked_at_hand(net, clients)([asked], [0, 1]))
    assert given[0].examples == plain.examples
    assert torch.allclose(given[0].losses, plain.losses, atol=1e-8)


def test_one_client_alone_is_no_sum(net, clients):
    with pytest.raises(FedMergeError, match="1 clients are left to ask under masks, and 2 are needed"):
        masked(asked_at_hand(net, clients), 0)([question(net)], [1])


def test_too_few_for_the_noise_they_share_is_an_error(net, clients):
    asked = replace(question(net), needs=(HeadSums(),), noise=NoisySums(1.0, 1.0, sharers=4))
    with pytest.raises(FedMergeError, match=r"3 clients are left .* and 4 are needed"):
        masked(asked_at_hand(net, clients), 0)([asked], [0, 1, 3])


def test_a_whole_merge_under_masks_is_the_merge_without(net, clients):
    models = [copy.deepcopy(net) for _ in clients]
    for i, model in enumerate(models):
        with torch.no_grad():
            model[0].weight += 0.1 * i
    method = "fedavg+logistic_head+natural_gradient"
    plain = fedmerge.merge(models, method, clients=clients)
    hidden = fedmerge.merge(models, method, clients=clients, privacy=Privacy(masks=True))
    for one, other in zip(plain.parameters(), hidden.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert not torch.allclose(plain[2].weight, sum(model[2].weight for model in models) / 4, atol=1e-2)


@pytest.mark.parametrize("kind", [HeadSums(clip=0.7), HeadGradient(clip=0.7)])
def test_no_example_adds_more_than_the_bound(net, kind):
    x, y = examples(0, 200)
    net[2].weight.data *= 10  # sure of itself, and wrong: gradients near their bound
    largest = dict.fromkeys(kind.bounds(), 0.0)
    for i in range(len(x)):
        for name, tensor in kind.measure(net, [(x[i : i + 1], y[i : i + 1])], None).items():
            largest[name.rpartition(".")[2]] = max(largest[name.rpartition(".")[2]], float(tensor.norm()))
    for part, bound in kind.bounds().items():
        assert 0.6 * bound < largest[part] <= bound * (1 + 1e-9), part


def test_noise_has_the_promised_variance(net, clients):
    noise = NoisySums(clip=1.5, noise_multiplier=2.0, loss_clip=3.0, sharers=4)
    asked = replace(question(net), needs=(HeadSums(),), noise=noise)
    kind, generator = noise.applied(HeadSums()), torch.Generator().manual_seed(0)
    ((x, y),) = clients[3]
    n = 72
    silent = kind.measure(net, [(x[torch.arange(80) % 10 != 0], y[torch.arange(80) % 10 != 0])], None)
    answers = [respond(asked, net, [(x, y)], generator) for _ in range(400)]
    # Two parts, four sharers: 2 sqrt(2 / 4) times what one example adds, 1.5^2 and 1.5.
    for name, spread in (("2.S", 2 * sqrt(0.5) * 1.5**2), ("2.C", 2 * sqrt(0.5) * 1.5)):
        full = next(key for key in silent if key.endswith(name[1:]))
        found = torch.stack([answer.statistics["head_sums"][full] for answer in answers]) - silent[full]
        assert float(found.std()) * n == pytest.approx(spread, rel=0.03), name
        assert abs(float(found.mean())) * n < 4 * spread / sqrt(found.numel()), name
    few = replace(asked, needs=(HeadSums(examples=10),))  # a mean over fewer, which each of them changes by more
    means = torch.stack(
        [respond(few, net, [(x, y)], generator).statistics["head_sums"]["2.weight.C"] for _ in range(400)]
    )
    assert float(means.std(0).mean()) * 10 == pytest.approx(2 * sqrt(0.5) * 1.5, rel=0.05)
    losses = torch.stack([answer.losses for answer in answers])
    assert float(losses.std(0).mean()) == pytest.approx(2 * 3.0 * sqrt(2) / 2, rel=0.1)


def test_noise_is_not_the_same_twice_and_no_bound_means_no_noise(net, clients):
    asked = replace(question(net), needs=(HeadSums(),), noise=NoisySums(1.0, 1.0))
    one, other = (respond(asked, net, clients[0]).losses for _ in range(2))
    assert not torch.equal(one, other)
    with pytest.raises(InvalidOption, match="'loss_gradient' cannot be sent with noise"):
        respond(replace(asked, needs=(LossGradient(),)), net, clients[0])


def test_an_answer_without_the_noise_asked_for_is_not_used(net, clients, caplog):
    """As a transport would have it that forgets the wish on the way."""
    asked = replace(question(net), needs=(HeadSums(),))
    answers = asked_at_hand(net, clients)([asked], range(4))
    noisy = replace(asked, noise=NoisySums(1.0, 1.0))
    with pytest.raises(FedMergeError, match="no client answered"):
        pooled([noisy], answers)
    assert "was asked for" in caplog.text
    with pytest.raises(FedMergeError, match="0 clients are left"):
        masked(lambda questions, numbers: answers, 0)([noisy], range(4))


def test_little_noise_changes_little_and_much_noise_leaves_the_model_as_it_was(net, clients):
    plain, little, much = (
        fedmerge.merge([net] * 4, "fedavg+ridge_head", clients=clients, privacy=privacy)[2].weight
        for privacy in (
            Privacy(),
            Privacy(noise=NoisySums(clip=100.0, noise_multiplier=1e-9, loss_clip=100.0)),
            Privacy(masks=True, noise=NoisySums(clip=2.5, noise_multiplier=1000.0, sharers=4)),
        )
    )
    assert not torch.allclose(plain, net[2].weight, atol=1e-2)
    assert torch.allclose(plain, little, atol=1e-3)
    assert torch.equal(much, net[2].weight)


def test_a_noisy_gram_is_made_one_that_can_be_inverted(net, clients):
    noise = NoisySums(clip=2.5, noise_multiplier=20.0)
    asked = replace(question(net), needs=(HeadSums(),), noise=noise)
    for seed in range(20):
        answers = asked_at_hand(net, clients, seed)([asked], range(4))
        (total,) = pooled([asked], answers)
        raw = sum(given[0].statistics["head_sums"]["2.weight.S"] * given[0].examples for _, given in answers)
        raw = (raw + raw.T) / 2 / total.examples
        steadied = total.statistics["head_sums"]["2.weight.S"]
        spread = 20 * sqrt(2) * 2.5**2 * sqrt(4) / total.examples
        shift = spread * sqrt(2 * (WIDTH + 1)) * torch.eye(WIDTH + 1, dtype=torch.float64)
        assert float(torch.linalg.eigvalsh(raw)[0]) < 0, "the test's noise is too small to matter"
        assert float(torch.linalg.eigvalsh(steadied)[0]) > -1e-9
        if float(torch.linalg.eigvalsh(raw + shift)[0]) > 0:
            assert torch.allclose(steadied, raw + shift)


def test_answers_are_counted_and_their_cost_is_what_opacus_says(net, clients):
    opacus = pytest.importorskip("opacus.accountants")
    pipeline = build_pipeline("fedavg+ridge_head", privacy=Privacy(noise=NoisySums(2.5, 4.0)))
    state = module_state(net)[0]
    updates = [fedmerge.ClientUpdate(i, state, 1.0) for i in range(4)]
    result = pipeline.merge(updates, fedmerge.MergeContext(ask=asked_at_hand(net, clients)))
    assert result.answers == 2  # the sums, and which head is best
    accountant = opacus.RDPAccountant()
    accountant.history = [(4.0, 1.0, 2)]
    assert epsilon(4.0, 2, 1e-5) == pytest.approx(accountant.get_epsilon(delta=1e-5), rel=1e-3)
    assert epsilon(4.0, 0, 1e-5) == 0
    # A bound, and not a loose one: the exact cost of a Gaussian mechanism (Balle and Wang 2018).
    for sigma in (0.5, 1.0, 20.0):
        exact = brentq(lambda e, s=sigma: norm.cdf(0.5 / s - e * s) - exp(e) * norm.cdf(-0.5 / s - e * s) - 1e-5, 0, 50)
        assert exact <= epsilon(sigma, 1, 1e-5) <= 1.2 * exact


@pytest.mark.parametrize(
    ("field", "value"),
    [("clip", 0.0), ("clip", float("nan")), ("noise_multiplier", -1.0), ("loss_clip", "4"), ("sharers", 0)],
)
def test_a_wrong_option_of_noise_is_an_error(field, value):
    with pytest.raises(InvalidOption, match=f"NoisySums: {field} must be"):
        NoisySums(**{"clip": 1.0, "noise_multiplier": 1.0, field: value})


def test_what_cannot_be_protected_is_refused():
    with pytest.raises(InvalidOption, match="sharers above 1"):
        Privacy(noise=NoisySums(1.0, 1.0, sharers=2))
    with pytest.raises(InvalidOption, match="fedavg\\+logistic_head\\+natural_gradient"):
        build_pipeline("fedkfac", privacy=Privacy(masks=True))
    with pytest.raises(InvalidOption, match="cannot be sent with noise"):
        build_pipeline("fedavg+natural_gradient", privacy=Privacy(noise=NoisySums(1.0, 1.0)))
    assert NaturalGradient() in build_pipeline("fedavg+natural_gradient", privacy=Privacy(masks=True)).refinements
    with pytest.raises(InvalidOption, match="epsilon wants"):
        epsilon(0.0, 1, 1e-5)
    with pytest.raises(InvalidOption, match="clip must be"):
        HeadSums(clip=-1.0)


@pytest.mark.parametrize("clients", [1, 4])
def test_a_point_has_to_be_better_than_the_present_model_by_three_deviations_of_a_difference(clients):
    """Two points of a client differ by two noises, and each noise is that of an example that adds to all points."""
    noise = NoisySums(clip=1.0, noise_multiplier=2.0, loss_clip=3.0, sharers=2)
    one = 2.0 * 3.0 * sqrt(5) / sqrt(2)  # of a client: multiplier, bound on five points together, sharers
    difference = sqrt(2) * one * sqrt(clients)
    found = noise.doubted(torch.arange(5, dtype=torch.float64), clients)
    assert found.tolist() == pytest.approx([0.0, *(i + 3 * difference for i in range(1, 5))])
