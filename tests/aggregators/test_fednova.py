"""FedNova against the paper's formula, written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedmerge import ClientUpdate, InvalidOption, MergeContext
from fedmerge.aggregators.fedavg import FedAvg
from fedmerge.aggregators.fednova import FedNova, step_norm
from fedmerge.merging import build_pipeline
from fedmerge.statistics import LocalSteps
from fedmerge.training import LocalTraining, train

ETA = 0.05


def steps(tau, rho=0.0, mu=0.0):
    return {"local_steps": float(tau), "momentum": rho, "learning_rate": ETA, "proximal_mu": mu}


def coefficients(tau, rho, mu):
    """The vector a of the paper: what a unit gradient in step k alone has moved by step tau, over eta."""
    moved = []
    for k in range(tau):
        u, v = 0.0, 0.0
        for step in range(tau):
            gradient = 1.0 if step == k else 0.0
            v = rho * v + gradient + mu * u
            u = u - ETA * v
        moved.append(-u / ETA)
    return np.array(moved)


KINDS = {"plain": (0.0, 0.0), "momentum": (0.9, 0.0), "proximal": (0.0, 2.0), "both": (0.5, 2.0), "swings": (0.9, 8.0)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [1, 2, 7, 40])
def test_the_norm_is_that_of_the_recursion(kind, tau):
    rho, mu = KINDS[kind]
    want = np.abs(coefficients(tau, rho, mu)).sum()
    assert step_norm(steps(tau, rho, mu)) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_that_of_torchs_own_optimiser(kind):
    """The coefficients of torch's SGD on a linear loss with a proximal term: d position / d gradient of step k."""
    (rho, mu), tau = KINDS[kind], 12
    gradients = torch.eye(tau, dtype=torch.float64)  # client k meets a unit gradient in step k alone
    position = torch.zeros(tau, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([position], lr=ETA, momentum=rho)
    for gradient in gradients:
        optimiser.zero_grad()
        (gradient @ position + 0.5 * mu * position.square().sum()).backward()
        optimiser.step()
    moved = -position.detach().numpy() / ETA
    np.testing.assert_allclose(moved, coefficients(tau, rho, mu), rtol=1e-9, atol=1e-12)
    assert step_norm(steps(tau, rho, mu)) == pytest.approx(np.abs(moved).sum(), rel=1e-9)


def test_the_norm_of_the_authors_counters():
    """The five clients of a federation on which the authors' own optimiser counted: momentum 0.9."""
    taus = [1880, 600, 1320, 820, 1680]
    assert [step_norm(steps(tau, 0.9)) for tau in taus] == pytest.approx([18710, 5910, 13110, 8110, 16710])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau_eff", ["mean_norm", "mean_steps", 12.5])
def test_the_merge_is_the_papers_formula(kind, tau_eff):
    rho, mu = KINDS[kind]
    draw = np.random.default_rng(0)
    x0 = draw.normal(size=(4, 3))
    taus, n = [3, 11, 5], np.array([30.0, 5.0, 65.0])
    x = [x0 + draw.normal(size=x0.shape) for _ in taus]
    p = n / n.sum()
    a = np.array([np.abs(coefficients(tau, rho, mu)).sum() for tau in taus])
    effective = {"mean_norm": p @ a, "mean_steps": p @ np.array(taus)}.get(tau_eff, tau_eff)
    want = x0 - effective * sum(p_i * (x0 - x_i) / a_i for p_i, x_i, a_i in zip(p, x, a, strict=True))

    updates = [
        ClientUpdate(i, {"w": torch.tensor(x[i])}, n[i], {"local_steps": LocalSteps().parse(steps(tau, rho, mu))})
        for i, tau in enumerate(taus)
    ]
    context = MergeContext(base={"w": torch.tensor(x0)})
    merged, _ = FedNova(tau_eff=tau_eff).merge(updates, context, {})
    np.testing.assert_allclose(merged["w"].numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_steps_give_fedavg(kind):
    rho, mu = KINDS[kind]
    base = {"w": torch.randn(5, generator=torch.Generator().manual_seed(0))}
    known = {"local_steps": LocalSteps().parse(steps(9, rho, mu))}
    updates = [ClientUpdate(i, {"w": base["w"] + i + torch.arange(5.0)}, 1.0 + i, known) for i in range(4)]
    nova, _ = FedNova().merge(updates, MergeContext(base=base), {})
    plain, _ = FedAvg().merge(updates, MergeContext(base=base), {})
    torch.testing.assert_close(nova["w"], plain["w"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_client_gives_its_own_model(kind):
    rho, mu = KINDS[kind]
    update = ClientUpdate(0, {"w": torch.arange(3.0)}, 7, {"local_steps": LocalSteps().parse(steps(9, rho, mu))})
    merged, _ = FedNova().merge([update], MergeContext(base={"w": torch.ones(3)}), {})
    torch.testing.assert_close(merged["w"], torch.arange(3.0))


def test_server_momentum_over_three_rounds_by_hand():
    gmf, x, buffer = 0.5, np.zeros(2), np.zeros(2)
    state, memory = {"w": torch.zeros(2)}, {}
    for round in range(3):
        targets = [np.array([1.0, round]), np.array([3.0, -1.0])]
        taus, p = np.array([2.0, 6.0]), np.array([0.25, 0.75])
        delta = (p @ taus) * sum(p[i] * (targets[i] - x) / taus[i] for i in range(2))
        buffer = gmf * buffer + delta
        x = x + buffer
        updates = [
            ClientUpdate(
                i, {"w": torch.tensor(targets[i], dtype=torch.float32)}, p[i], {"local_steps": steps_of(taus[i])}
            )
            for i in range(2)
        ]
        state, memory = FedNova(server_momentum=gmf).merge(updates, MergeContext(base=state), memory)
        np.testing.assert_allclose(state["w"].numpy(), x, rtol=1e-6)


def steps_of(tau):
    return LocalSteps().parse({"local_steps": tau})


@pytest.mark.parametrize("kind", KINDS)
def test_local_training_is_the_recursion_that_the_norm_assumes(kind):
    """With a constant gradient g, local SGD must move by eta * sum(a) * g, sum(a) from the recursion."""
    rho, mu = KINDS[kind]

    class Constant(nn.Module):
        """Cross-entropy of two logits has gradient (p - y): zero weights on a huge scale keep it constant."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            return torch.stack([1e-7 * self.w.expand(len(x)), torch.zeros(len(x), dtype=torch.float64)], -1)

    model = Constant()
    settings = LocalTraining(learning_rate=ETA, momentum=rho, proximal_mu=mu, steps=10, batch_size=4)
    train(model, torch.zeros(8, 1), torch.zeros(8, dtype=torch.long), settings, seed=0, client=0, round=1)
    gradient = -0.5e-7
    assert model.w.item() == pytest.approx(-ETA * gradient * coefficients(10, rho, mu).sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"local_steps": 0}, "at least 1"),
        ({"local_steps": 1e18}, "at most"),  # adding that many up would never end
        ({"local_steps": float("nan")}, "at least 1"),
        ({"momentum": 0.9}, "at least 1"),
        ({"local_steps": 3, "momentum": 1.0}, "momentum"),
        ({"local_steps": 3, "learning_rate": -1}, "learning_rate"),
        ({"local_steps": "many"}, "number"),
    ],
)
def test_impossible_statistics_are_refused(known, words):
    with pytest.raises(InvalidOption, match=words):
        LocalSteps().parse(known)


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"local_steps": 3.0, "momentum": 0.0, "learning_rate": 0.0, "proximal_mu": 1.0}, "learning_rate beside it"),
        ({"local_steps": 3.0, "momentum": 0.0, "learning_rate": 1.0, "proximal_mu": 1.0}, "below 1"),
    ],
)
def test_proximal_terms_that_have_no_norm(known, words):
    with pytest.raises(InvalidOption, match=words):
        step_norm(known)


@pytest.mark.parametrize(
    ("rho", "mu", "want"), [(1 - 1e-9, 0.0, 55.0), (0.0, 1e-15, 10.0)], ids=["momentum to 1", "proximal to 0"]
)
def test_the_norm_has_its_limits(rho, mu, want):
    assert step_norm(steps(10, rho, mu)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("known", [{"proximal_mu": 1.0}, {"proximal_mu": 20.0, "learning_rate": ETA}])
def test_a_client_whose_proximal_term_has_no_norm_is_a_bad_update(known):
    updates = [
        ClientUpdate(0, {"w": torch.ones(2)}, 1, {"local_steps": {"local_steps": 4}}),
        ClientUpdate(1, {"w": torch.ones(2)}, 1, {"local_steps": {"local_steps": 4, **known}}),
    ]
    result = build_pipeline("fednova").merge(updates, MergeContext(base={"w": torch.zeros(2)}))
    assert result.accepted == (0,)
    assert [bad.client for bad in result.dropped] == [1]


@pytest.mark.parametrize("options", [{"tau_eff": "sum"}, {"tau_eff": -1.0}, {"server_momentum": 1.0}])
def test_options_out_of_range(options):
    with pytest.raises(InvalidOption, match=next(iter(options))):
        FedNova(**options)
