"""Natural-gradient steps: the subspace that they span, how far they go in it, and what clients are asked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmerge.errors import InvalidOption
from fedmerge.questions import Question, respond
from fedmerge.refine import NaturalGradient, Proposal, Refinement, RidgeHead, Step, refine
from fedmerge.refine.budget import Budget
from fedmerge.refine.natural_gradient import GradientStep, NaturalStep, SecantStep
from fedmerge.refine.second_order import blocks, coefficients, natural_direction
from fedmerge.statistics import FisherKfac, LossGradient, Secants, StatisticsSettings
from fedmerge.statistics.sending.compression import state_bytes


def net(seed=0, norm=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = [nn.LayerNorm(8)] if norm else []
        return nn.Sequential(nn.Linear(4, 8), *middle, nn.ReLU(), nn.Linear(8, 3))


def blobs(seed, n=80):
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(3, 4, generator=torch.Generator().manual_seed(99))
    y = torch.randint(3, (n,), generator=generator)
    return means[y] + torch.randn(n, 4, generator=generator), y


CLIENTS = {i: [blobs(i)] for i in range(3)}


def asker(module, asked):
    def ask(questions, clients):
        asked.append(list(questions))
        return [(i, [respond(q, module, CLIENTS[i]) for q in questions]) for i in clients]

    return ask


def refined(module, refinement, budget=None, alternatives=()):
    asked = []
    parts = refinement if isinstance(refinement, list) else [refinement]
    settings, clients = StatisticsSettings(), list(CLIENTS)
    found = refine(module.state_dict(), alternatives, parts, asker(module, asked), clients, settings, budget=budget)
    return found, asked


@dataclass(frozen=True)
class RuinousStep(Step):
    """Proposes what is sure to be declined."""

    def needs(self):
        return ()

    def propose(self, state, sums, memory):
        worse = {name: 1e3 * torch.randn(tensor.shape) for name, tensor in state.items()}
        return Proposal((worse,), ((0.0,), (1.0,)), None), memory


@dataclass(frozen=True)
class Ruinous(Refinement):
    """One such step."""

    def steps(self, state):
        return (RuinousStep(),)


def measured(found):
    return [exchange.measured for exchange in found.exchanges]


@pytest.mark.parametrize(("layers", "most"), [(3, 3), (8, 8), (9, 8), (40, 8)])
def test_a_direction_is_cut_at_matrix_layers_into_at_most_eight_blocks(layers, most):
    names = [f"{i}.{part}" for i in range(layers) for part in ("weight", "bias", "norm")]
    direction = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    cut = blocks(direction, [f"{i}.weight" for i in range(layers)])
    assert len(cut) <= most
    assert [name for block in cut for name in block] == names
    assert all(next(iter(block)).endswith("weight") for block in cut)


def test_parameters_before_the_first_matrix_have_a_block_of_their_own():
    one = torch.ones(1)
    assert [list(b) for b in blocks({"embedding": one, "fc": one}, ["fc"])] == [["embedding"], ["fc"]]
    assert blocks({}, []) == []


def test_coefficients_minimise_the_damped_quadratic():
    root = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curvature, slope = root.T @ root, torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    for trust, c in zip((0.01, 1.0), coefficients(slope, curvature, (0.01, 1.0)), strict=True):
        left = slope + (curvature + trust * torch.diag(curvature.diagonal())) @ c
        assert left.abs().max() < 1e-10


def test_a_direction_that_changes_nothing_is_left_alone():
    curvature = torch.diag(torch.tensor([1.0, 0.0]))
    (c,) = coefficients(torch.tensor([-1.0, 0.0]), curvature, [1e-9])
    assert c.tolist() == pytest.approx([1.0, 0.0])
    assert coefficients(torch.zeros(2), torch.zeros(2, 2), [1.0])[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("norm", [False, True])
def test_steps_lower_the_loss_and_ask_for_factors_once(norm):
    module = net(norm=norm)
    found, _ = refined(module, NaturalGradient(count=3, refresh=False))
    losses = [e.loss for e in found.exchanges if e.judged]
    assert losses == sorted(losses, reverse=True)
    x, y = (torch.cat([pair[i] for (pair,) in CLIENTS.values()]) for i in (0, 1))
    before = float(F.cross_entropy(module(x), y).detach())
    assert losses[-1] < 0.4 * before
    kinds = [kind for kinds in measured(found) for kind in kinds]
    assert kinds.count("fisher_kfac") == 1
    assert kinds.count("loss_gradient") >= 2


def test_one_step_goes_further_than_the_best_single_length():
    """The subspace holds every damping's direction: its minimum is no worse than a search along each."""
    module = net()
    (x, y) = (torch.cat([pair[i] for (pair,) in CLIENTS.values()]) for i in (0, 1))

    def loss(state):
        other = net()
        other.load_state_dict(state)
        return float(F.cross_entropy(other(x), y).detach())

    step = NaturalStep((0.1, 1.0, 10.0), None)
    sums = {kind.name: kind.measure(module, [(x, y)], None) for kind in step.needs()}
    _, memory = step.propose(module.state_dict(), sums, {})
    question = SecantStep().question(module.state_dict(), memory)
    found = {"secants": Secants().along(module, question.directions, [(x, y)])}
    proposal, _ = SecantStep().propose(module.state_dict(), found, memory)
    around = proposal.around(module.state_dict())
    ours = min(loss(around.point(i)) for i in range(len(around.points)))
    alone = []
    for i in range(3):
        whole = {name: t for block in question.directions[2 * i : 2 * i + 2] for name, t in block.items()}
        for length in (0.125, 0.25, 0.5, 1.0):
            state = {name: t + length * whole.get(name, 0) for name, t in module.state_dict().items()}
            alone.append(loss(state))
    assert ours < min(alone)


def test_the_step_before_is_among_the_directions():
    module = net()
    step = GradientStep((1.0,))
    (x, y) = CLIENTS[0][0]
    sums = {kind.name: kind.measure(module, [(x, y)], None) for kind in (LossGradient(), FisherKfac())}
    _, first = NaturalStep((1.0,), None).propose(module.state_dict(), sums, {})
    moved = {name: t + 0.5 for name, t in module.state_dict().items()}
    _, second = step.propose(moved, {"loss_gradient": sums["loss_gradient"]}, first)
    before, after = (SecantStep().question(module.state_dict(), memory).directions for memory in (first, second))
    assert len(before) == 3  # two layers, and the head's own weights
    assert len(after) == 5
    assert all(torch.allclose(t, torch.full_like(t, 0.5)) for direction in after[3:] for t in direction.values())


def test_a_step_that_gains_nothing_is_the_last(monkeypatch):
    module = net()
    monkeypatch.setattr("fedmerge.refine.natural_gradient._TRUSTS", (0.1,))
    monkeypatch.setattr("fedmerge.refine.natural_gradient._LENGTHS", (1.0,))
    monkeypatch.setattr("fedmerge.refine.natural_gradient.coefficients", lambda s, f, t: [100 * s])  # uphill
    found, _ = refined(module, NaturalGradient(count=3))
    assert all(torch.equal(found.state[name], t) for name, t in module.state_dict().items())
    assert sum("secants" in kinds for kinds in measured(found)) == 1


def test_a_stage_that_was_declined_does_not_keep_the_first_step_from_being_tried():
    module = net()
    with torch.no_grad():
        module[2].weight.zero_()
        module[2].bias.zero_()
    found, _ = refined(module, [Ruinous(), NaturalGradient()])
    assert [exchange.judged for exchange in found.exchanges if exchange.judged] == ["RuinousStep", "SecantStep"]
    judged = [exchange.loss for exchange in found.exchanges if exchange.judged]
    assert judged[1] < 0.9 * judged[0]


def test_large_exchanges_are_one_for_the_head_and_one_for_each_step():
    parts = [RidgeHead(), NaturalGradient(count=3, refresh=False)]
    found, asked = refined(net(), parts, alternatives=[net(1).state_dict()])
    large = [kinds for kinds in measured(found) if kinds and kinds != ("secants",)]
    assert large == [("head_sums",), ("loss_gradient", "fisher_kfac"), ("loss_gradient",), ("loss_gradient",)]
    assert len(found.exchanges) == len(asked) == 11
    assert [len(questions) for questions in asked] == [2, 2, *[1] * 9]  # the head is fitted to both merges


def test_directions_do_not_travel_with_a_judgement_that_does_not_need_them():
    _, asked = refined(net(), NaturalGradient(solves=2))
    kinds = [[kind.name for kind in question.needs] for (question,) in asked]
    assert kinds[:3] == [["loss_gradient", "fisher_kfac"], ["secants"], ["secants"]]
    assert len(asked[2][0].points) > 1  # the second solve is prepared where the first is likely to end
    assert asked[2][0].at is not None


def test_the_budget_goes_to_factors_where_gradients_have_enough():
    state = net().state_dict()
    full, again = NaturalStep((1.0,), None), GradientStep((1.0,))
    size = sum(t.numel() for t in state.values())
    alone, beside = (Budget(9000.0).allowed(full, state, to_come, 1, 1) for to_come in ([full], [again]))
    assert beside > 1.4 * alone
    assert Budget(9000.0).allowed(again, state, [], 1, 1) == pytest.approx(1.1 * size)
    # Where not even one is left its least, those to come go without.
    least = full.least(state)
    assert Budget(1.5 * least + 300).allowed(full, state, [again, again], 1, 1) >= least
    # Three would have a third of 2.2 times the least each: two have enough.
    two = Budget(2.2 * least / 0.95 + 200).allowed(full, state, [full, full], 1, 1)
    assert two == pytest.approx(1.1 * least, rel=0.05)
    with pytest.raises(InvalidOption, match="budget leaves"):
        Budget(100.0).allowed(full, state, [], 1, 1)


@pytest.mark.parametrize("damping", [0.04, 0.25])
def test_each_factor_is_damped_by_the_root_of_the_damping_times_its_mean_diagonal(damping):
    a, g = np.array([[4.0, 1.0], [1.0, 2.0]]), np.array([[1.0, 0.0, 0.5], [0.0, 3.0, 0.0], [0.5, 0.0, 2.0]])
    gradient = np.array([[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]])
    inner = a + np.sqrt(damping) * 3.0 * np.eye(2)  # (4 + 2) / 2
    outer = g + np.sqrt(damping) * 2.0 * np.eye(3)  # (1 + 3 + 2) / 3
    fisher = {"w.A": torch.from_numpy(a), "w.G": torch.from_numpy(g)}
    found = natural_direction({"w": torch.zeros(3, 2)}, {"w": torch.from_numpy(gradient)}, fisher, damping)
    np.testing.assert_allclose(found["w"], -np.linalg.inv(outer) @ gradient @ np.linalg.inv(inner))


def test_a_diagonal_is_damped_by_the_damping_times_its_mean():
    fisher, gradient = {"b.diag": torch.tensor([1.0, 5.0])}, {"b": torch.tensor([2.0, 3.0])}
    found = natural_direction({"b": torch.zeros(2)}, gradient, fisher, 0.25)
    np.testing.assert_allclose(found["b"], [-2 / (1 + 0.25 * 3), -3 / (5 + 0.25 * 3)])


@dataclass(frozen=True)
class CheapStep(RuinousStep):
    """One that could do with any number of bytes."""


def test_judgements_of_this_exchange_and_of_the_next_are_paid_before_anything_is_measured():
    loss = torch.zeros(1, dtype=torch.float64).nbytes
    for points, questions in ((10, 1), (0, 2), (7, 3)):
        judged = loss * (points + 24 * questions)  # each question's proposal has about 24 points
        found = Budget(9000.0).allowed(CheapStep(), {}, [], questions, points)
        assert found == pytest.approx(0.18 * (9000 - judged) / questions)
    with pytest.raises(InvalidOption, match="leaves 0 bytes"):
        Budget(loss * (5 + 24.0)).allowed(CheapStep(), {}, [], 1, 5)
    assert Budget(loss * (5 + 24.0) + 1).allowed(CheapStep(), {}, [], 1, 5) > 0


def test_what_clients_have_sent_is_what_their_statistics_and_their_losses_weigh():
    module, budget = net(), Budget(10_000.0)
    directions = ({"0.bias": torch.ones(8)},)
    question = Question(module.state_dict(), directions, tuple((float(i),) for i in range(6)), needs=(LossGradient(),))
    answers = {client: respond(question, module, CLIENTS[client]) for client in (0, 1)}
    size = state_bytes(answers[0].statistics["loss_gradient"]) + 6 * 8
    # Client 0 sends twice, client 1 once; a client that is refused costs the others nothing.
    assert budget.spend([(0, [answers[0]]), (1, [answers[1]])]) == size
    assert budget.spend([(0, [answers[0]]), (2, [answers[1]] * 9)], refused=[2]) == size
    assert budget.left == 10_000 - 2 * size


def test_answers_about_another_number_of_directions_are_left_out(caplog):
    module = net()

    def ask(questions, clients):
        answers = asker(module, [])(questions, clients)
        for answer in answers[0][1]:
            if "secants" in answer.statistics:
                answer.statistics["secants"] = {"slope": torch.zeros(1), "curvature": torch.zeros(1, 1)}
        return answers

    found = refine(module.state_dict(), [], [NaturalGradient()], ask, [0, 1, 2], StatisticsSettings())
    assert "client 0: its answer is left out" in caplog.text
    assert found.exchanges[-1].judged == "SecantStep"


@pytest.mark.parametrize(("option", "value"), [("count", 0), ("solves", 0), ("dampings", ()), ("dampings", (0.0,))])
def test_wrong_options_are_named(option, value):
    with pytest.raises(InvalidOption, match=option):
        NaturalGradient(**{option: value})
