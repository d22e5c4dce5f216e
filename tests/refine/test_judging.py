"""Losses of models that differ in the head alone are those of running each model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmerge.models.resize import resize
from fedmerge.questions import Question, respond
from fedmerge.questions.answering import summed_losses


class Counting(nn.Module):
    """Two layers, and how often the first has run."""

    def __init__(self, scaled=False):
        super().__init__()
        self.body, self.head, self.runs, self.scaled = nn.Linear(4, 6), nn.Linear(6, 3), 0, scaled
        self.body.register_forward_hook(self._count)

    def _count(self, *_):
        Counting.total += 1

    def forward(self, x):
        out = self.head(torch.relu(self.body(x)))
        return 2 * out if self.scaled else out


@pytest.mark.parametrize(("scaled", "runs"), [(False, 1 + 2), (True, 1 + 5 * 2)])
@pytest.mark.parametrize("bound", [None, 0.5])
def test_features_are_computed_once_where_that_gives_the_same(scaled, runs, bound):
    torch.manual_seed(0)
    module = Counting(scaled).eval()
    batches = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(2)]
    states = [{**module.state_dict(), "head.weight": torch.randn(3, 6)} for _ in range(5)]
    Counting.total = 0
    found = summed_losses(module, [lambda s=s: resize(module, s) for s in states], batches, {"head.weight"}, bound)
    assert Counting.total == runs  # one to see what the head gives
    wanted = []
    for state in states:
        model = resize(module, state)
        each = torch.cat([nn.functional.cross_entropy(model(x), y, reduction="none") for x, y in batches])
        wanted.append(float((each if bound is None else each.clamp(max=bound)).sum()))
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_models_that_differ_elsewhere_are_run_one_by_one():
    module = Counting().eval()
    Counting.total = 0
    summed_losses(module, [lambda: module] * 3, [(torch.randn(5, 4), torch.randint(3, (5,)))], {"body.weight"})
    assert Counting.total == 1 + 3


def test_a_layer_that_the_model_never_calls_is_no_head():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare, self.head = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(input=x)

    module, batches = Idle().eval(), [(torch.randn(5, 4), torch.randint(3, (5,)))]
    states = [module.state_dict(), {**module.state_dict(), "spare.weight": torch.zeros(3, 4)}]
    for changed in ({"spare.weight"}, {"head.weight"}):
        found = summed_losses(module, [lambda s=s: resize(module, s) for s in states], batches, changed)
        assert found[0] == pytest.approx(found[1])


def test_models_that_are_filled_into_one_copy_are_judged_as_copies_of_their_own():
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    far = {name: torch.full_like(tensor, torch.inf) for name, tensor in state.items() if tensor.is_floating_point()}
    step = {name: torch.randn_like(tensor) for name, tensor in module.named_parameters()}
    question = Question(state, (step, far), ((0.0, 0.0), (0.5, 0.0), (0.0, 1.0), (1.0, 0.0)))
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    found = respond(question, module, [(x, y)]).loss
    for i in (0, 1, 3):  # one that has diverged leaves nothing behind
        alone = resize(module, question.point(i)).eval()(x[::10])
        assert float(found[i]) == pytest.approx(float(nn.functional.cross_entropy(alone, y[::10])), rel=1e-6)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
