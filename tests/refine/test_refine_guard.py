"""The walk through refinements: what is asked, what is believed, and what is declined."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedmerge
from fedmerge.errors import InvalidOption, NoAnswer
from fedmerge.questions import Answer, Question, pooled, respond
from fedmerge.refine import LogisticHead, NaturalGradient, Proposal, Refinement, RidgeHead, Step, refine
from fedmerge.statistics import ClassCounts, HeadSums, LossGradient, StatisticsSettings


def blobs(seed, n=60, classes=3, d=4):
    """Three overlapping classes."""
    generator = torch.Generator().manual_seed(seed)
    means = 1.5 * torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (n,), generator=generator)
    return means[y] + torch.randn(n, d, generator=generator), y


def net(seed=0, d=4, classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(d, 8), nn.ReLU(), nn.Linear(8, classes))


CLIENTS = {i: [blobs(i)] for i in range(3)}


@dataclass
class Asked:
    """Asks clients at hand, and keeps what it asked."""

    module: nn.Module
    clients: dict = field(default_factory=lambda: CLIENTS)
    questions: list = field(default_factory=list)

    def __call__(self, questions, clients):
        self.questions.append(list(questions))
        return [(i, [respond(q, self.module, self.clients[i]) for q in questions]) for i in clients]


def loss(module, state, clients=None):
    """Mean held-out cross-entropy."""
    clients = CLIENTS if clients is None else clients
    question = Question(state, (), ((),))
    return float(pooled([question], [(i, [respond(question, module, b)]) for i, b in clients.items()])[0].loss[0])


@dataclass(frozen=True)
class Scripted(Step):
    """Proposes what it is told to."""

    proposal: Proposal | None
    kinds: tuple = ()
    problem: str = ""

    def needs(self):
        return self.kinds

    def propose(self, state, sums, memory):
        if self.problem:
            raise InvalidOption(self.problem)
        return self.proposal, {}


@dataclass(frozen=True)
class Script(Refinement):
    """Steps one after the other."""

    parts: tuple

    def steps(self, state):
        return self.parts


def walked(module, *steps, alternatives=(), asked=None):
    asked = asked or Asked(module)
    return refine(module.state_dict(), alternatives, [Script(steps)], asked, [0, 1, 2], StatisticsSettings()), asked


def towards(direction, preferred=0, points=((0.0,), (1.0,))):
    return Scripted(Proposal((direction,), points, preferred))


def test_a_proposal_that_makes_it_worse_is_declined():
    module = net()
    ruin = {name: 100 * torch.randn_like(t) for name, t in module.state_dict().items()}
    found, _ = walked(module, towards(ruin))
    assert found.exchanges[-1].point == (0.0,)
    assert all(torch.equal(found.state[name], tensor) for name, tensor in module.state_dict().items())


def test_a_proposal_that_diverges_is_declined():
    module = net()
    found, _ = walked(module, towards({"0.weight": torch.full((8, 4), torch.inf)}))
    assert torch.equal(found.state["0.weight"], module[0].weight)


def test_the_best_point_goes_on():
    module = net()
    gradient = LossGradient().measure(module, [batch for b in CLIENTS.values() for batch in b], None)
    down = {name: -g for name, g in gradient.items()}
    found, _ = walked(module, towards(down, points=((0.0,), (0.5,), (-0.5,))))
    assert found.exchanges[-1].point == (0.5,)
    assert found.exchanges[-1].loss == pytest.approx(loss(module, found.state))
    assert loss(module, found.state) < loss(module, module.state_dict())


def test_statistics_come_with_the_judgement_where_the_guess_was_right():
    module = net()
    ruin = {"0.weight": 100 * torch.ones(8, 4)}
    found, asked = walked(module, towards(ruin, preferred=0), Scripted(None, (HeadSums(),)))
    # The first step needs nothing, which still takes an exchange; then the judgement brings the sums along.
    assert [e.measured for e in found.exchanges] == [(), ("head_sums",)]
    assert asked.questions[1][0].at == 0


def test_they_are_measured_anew_where_it_was_wrong():
    module = net()
    ruin = {"0.weight": 100 * torch.ones(8, 4)}
    found, asked = walked(module, towards(ruin, preferred=1), Scripted(None, (HeadSums(),)))
    assert [e.measured for e in found.exchanges] == [(), ("head_sums",), ("head_sums",)]
    assert asked.questions[2][0].at is None
    assert torch.equal(asked.questions[2][0].base["0.weight"], module[0].weight)


@pytest.mark.parametrize(("nearly", "exchanges"), [(0.99999, 2), (0.99, 3)])
def test_a_guess_far_from_the_best_is_no_good_though_it_has_nearly_all_of_the_gain(nearly, exchanges):
    """From a model that has diverged any point gains nearly all there is to gain."""
    module = net()
    ruined = net()
    with torch.no_grad():
        ruined[2].weight += 1000 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    back = {"2.weight": module[2].weight.detach() - ruined[2].weight.detach()}
    points = ((0.0,), (nearly,), (1.0,))
    found, _ = walked(ruined, towards(back, 1, points), Scripted(None, (HeadSums(),)))
    at_start, guess, best = (loss(ruined, Question(ruined.state_dict(), (back,), points).point(i)) for i in range(3))
    assert at_start - guess > 0.95 * (at_start - best)
    assert len(found.exchanges) == exchanges
    assert found.exchanges[1].point == (points[1] if exchanges == 2 else points[2])


def test_a_step_that_does_not_apply_is_skipped_with_its_reason(caplog):
    module = net()
    found, _ = walked(module, Scripted(None, problem="no head of this kind"))
    assert "Scripted is skipped: no head of this kind" in caplog.text
    assert all(torch.equal(found.state[name], tensor) for name, tensor in module.state_dict().items())


@dataclass
class Leaving(Asked):
    """Clients that are gone after so many exchanges."""

    exchanges: int = 1

    def __call__(self, questions, clients):
        if len(self.questions) >= self.exchanges:
            return []
        return super().__call__(questions, clients)


def harmful(module, points, **keywords):
    return Scripted(Proposal((dict.fromkeys(module.state_dict(), torch.tensor(50.0)),), points, 0), **keywords)


@pytest.mark.parametrize("left", [1, 2])
def test_a_stage_that_loses_its_clients_between_its_steps_leaves_nothing_half_done(left):
    module = net()
    unjudged = harmful(module, ((1.0,),), kinds=(ClassCounts(),))
    found, _ = walked(module, unjudged, unjudged, unjudged, asked=Leaving(module, exchanges=left))
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(found.state[name], tensor)


@pytest.mark.parametrize("after", [(), (RidgeHead(),)])
def test_a_stage_of_which_a_step_is_skipped_leaves_nothing_half_done(after):
    module = net()
    unjudged = harmful(module, ((1.0,),))
    further = [step for one in after for step in one.steps({})]
    found, _ = walked(module, unjudged, Scripted(None, problem="too dear"), *further)
    assert torch.equal(found.state["0.weight"], module.state_dict()["0.weight"])
    assert loss(module, found.state) <= loss(module, module.state_dict())


@pytest.mark.parametrize("refinement", [RidgeHead(), LogisticHead()])
def test_a_model_without_a_linear_head_keeps_what_it_has(refinement, caplog):
    class Cosine(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.classes = nn.Linear(4, 8), nn.Parameter(torch.randn(3, 8))

        def forward(self, x):
            return F.normalize(self.body(x), dim=1) @ F.normalize(self.classes, dim=1).T

    module = Cosine()
    found = refine(module.state_dict(), [], [refinement], Asked(module), [0, 1, 2], StatisticsSettings())
    assert "skipped" in caplog.text
    assert all(torch.equal(found.state[name], tensor) for name, tensor in module.state_dict().items())


def test_the_best_of_several_merges_goes_on():
    good, bad = net(), net(1)
    for _ in range(50):
        gradient = LossGradient().measure(good, [batch for b in CLIENTS.values() for batch in b], None)
        with torch.no_grad():
            for name, p in good.named_parameters():
                p.sub_(0.5 * gradient[name])
    found, _ = walked(bad, alternatives=[good.state_dict()])
    assert torch.equal(found.state["0.weight"], good[0].weight)


@pytest.mark.parametrize("refinement", [RidgeHead(), LogisticHead(), NaturalGradient(count=2)])
def test_no_refinement_raises_the_held_out_loss(refinement):
    module = net()
    found = refine(module.state_dict(), [], [refinement], Asked(module), [0, 1, 2], StatisticsSettings())
    losses = [e.loss for e in found.exchanges if e.judged]
    assert losses == sorted(losses, reverse=True)
    assert loss(module, found.state) < loss(module, module.state_dict())


def test_the_logistic_head_reaches_the_optimum_of_the_pooled_features():
    module = net()
    pairs = [(x[torch.arange(len(x)) % 10 != 0], y[torch.arange(len(x)) % 10 != 0]) for ((x, y),) in CLIENTS.values()]
    x, y = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    found = refine(
        module.state_dict(), [], [LogisticHead(exchanges=12)], Asked(module), [0, 1, 2], StatisticsSettings()
    )
    module.load_state_dict(found.state)
    features = module[:2](x).detach()
    reached = float(F.cross_entropy(module[2](features), y).detach())
    head = nn.Linear(8, 3)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = F.cross_entropy(head(features), y)
        value.backward()
        return value

    optimiser.step(closure)
    assert reached < float(closure().detach()) + 0.02


def test_examples_that_judge_are_not_measured():
    module, (x, y) = net(), blobs(0, n=21)
    question = Question(module.state_dict(), (), ((),), None, (ClassCounts(),))
    answer = respond(question, module, [(x, y)])
    assert (answer.judged, answer.examples) == (3, 18)
    counted = answer.statistics["class_counts"]["class_counts"]
    assert counted.sum() == 18
    assert float(answer.losses[0]) == pytest.approx(
        float(F.cross_entropy(module(x[::10]), y[::10], reduction="sum").detach())
    )


def test_a_client_with_a_single_example_measures_and_does_not_judge():
    module = net()
    question = Question(module.state_dict(), (), ((),), None, (HeadSums(),))
    answer = respond(question, module, [blobs(0, n=1)])
    assert (answer.judged, answer.examples) == (0, 1)


@pytest.mark.parametrize(
    "broken",
    [
        lambda a: Answer(a.losses[:1], a.judged, a.examples, a.statistics),
        lambda a: Answer(a.losses, -1, a.examples, a.statistics),
        lambda a: Answer(a.losses, a.judged, a.examples, {}),
        lambda a: Answer(a.losses, a.judged, a.examples, {"head_sums": {"2.weight.S": torch.full((9, 9), torch.nan)}}),
        lambda a: Answer(a.losses, a.judged, a.examples, {"head_sums": {"2.weight.S": torch.eye(3)}}),
    ],
)
def test_an_answer_that_cannot_be_one_is_left_out(broken, caplog):
    module = net()
    question = Question(module.state_dict(), ({},), ((0.0,), (1.0,)), None, (HeadSums(),))
    answers = [(i, [respond(question, module, b)]) for i, b in CLIENTS.items()]
    worse = [*answers[:2], (2, [broken(answers[2][1][0])])]
    (kept,) = pooled([question], worse)
    assert kept.examples == answers[0][1][0].examples + answers[1][1][0].examples
    assert "client 2: its answer is left out" in caplog.text
    with pytest.raises(NoAnswer, match="no client answered"):
        pooled([question], worse[2:])


def test_refinements_without_clients_are_refused_before_anything_is_merged():
    models = [net(), net()]
    with pytest.raises(InvalidOption, match="pass clients="):
        fedmerge.merge(models, "fedavg+ridge_head")
    with pytest.raises(InvalidOption, match="pass clients="):
        fedmerge.merge(models, "fedkfac", example=torch.zeros(2, 4), base=net())


def test_clients_that_are_gone_leave_the_merge_as_it_was(caplog):
    module = net()
    found = refine(module.state_dict(), [], [LogisticHead()], lambda q, c: [], [0, 1, 2], StatisticsSettings())
    assert "refined no further" in caplog.text
    assert all(torch.equal(found.state[name], tensor) for name, tensor in module.state_dict().items())
