"""Layer-by-layer refit: against plain least squares, on copies, after alignment, and when it does harm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import InvalidOption
from fedmerge.questions import Question, pooled, respond
from fedmerge.refine import SequentialRefit
from fedmerge.refine.sequential_refit import RefitStep
from fedmerge.state import module_state
from fedmerge.statistics import Gram, RefitSums
from fedmerge.statistics.measuring.weight_matrices import WeightMatrix
from tests.statistics.zoo import made


def _mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12, bias=False), nn.ReLU(), nn.Linear(12, 3))


def _batch(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def _answering(monkeypatch):
    """What clients were asked, and with which model of their own, one entry an answer."""
    seen = []

    def noted(question, module, batches, generator, own, *others):
        seen.append((question, own))
        return respond(question, module, batches, generator, own, *others)

    monkeypatch.setattr("fedmerge.offline.merge.respond", noted)
    return seen


def _trained(seed: int, n: int = 400) -> tuple[nn.Sequential, tuple[torch.Tensor, torch.Tensor]]:
    model, (x, y) = _mlp(seed), _batch(n, seed)
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model, (x, y)


@pytest.mark.parametrize("head", [False, True])
def test_copies_of_one_model_are_refitted_to_it(head):
    model = _mlp(0)
    loaders = [[_batch(30, 1)], [_batch(50, 2)], [_batch(7, 3)]]  # 7 examples leave moments singular
    merged = fedmerge.merge([model] * 3, f"fedavg+sequential_refit(head={str(head).lower()})", clients=loaders)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "no bias", "cnn", "dilated", "oblong", "reflect", "conv1d", "batch norm"])
def test_own_pre_activations_of_the_merged_model_itself_are_its_weights_times_the_moments(name):
    model, x, y = made(name)
    model = model.double()
    value = RefitSums().compare(model, model, [(x.double(), y)])
    RefitSums().check(value, model.state_dict())
    grams = Gram().measure(model, [(x.double(), y)], None)
    assert {weight for weight, _, part in (key.rpartition(".") for key in value)} == set(grams)
    for weight, gram in grams.items():
        matrix = WeightMatrix.measured_by(weight, gram, model.state_dict()).gather(model.state_dict())
        torch.testing.assert_close(value[f"{weight}.S"], gram)
        torch.testing.assert_close(value[f"{weight}.Z"].reshape(matrix.shape), (matrix @ gram).reshape(matrix.shape))


def test_a_layer_is_least_squares_on_all_data_in_one_place():
    """Merged inputs and own pre-activations of all clients stacked, with the pull as further rows."""
    merged, owns = _mlp(0).double(), [_mlp(1).double(), _mlp(2).double()]
    data = [_batch(40, 1), _batch(90, 2)]
    data = [(x.double(), y) for x, y in data]
    step = RefitStep("2.weight", last=False, ridge=1e-2, examples=None)
    question = Question(merged.state_dict(), needs=step.needs())
    answers = [(i, [respond(question, merged, [data[i]], own=owns[i])]) for i in range(2)]
    state = merged.state_dict()
    proposal, _ = step.propose(state, pooled([question], answers)[0].statistics, {})
    got = state["2.weight"] + proposal.directions[0]["2.weight"]
    kept = [x[torch.arange(len(x)) % 10 != 0] for x, _ in data]
    with torch.no_grad():
        h = torch.cat([merged[:2](x) for x in kept])
        z = torch.cat([own[:3](x) for own, x in zip(owns, kept, strict=True)])
        pull = (1e-2 * h.square().sum() / h.shape[1]).sqrt()
        rows = torch.cat([h, pull * torch.eye(16).double()])
        wanted = torch.linalg.lstsq(rows, torch.cat([z, pull * state["2.weight"].T])).solution.T
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


def test_models_trained_apart_are_compared_in_the_merged_order(monkeypatch):
    """A model and a copy with its neurons shuffled: clients get theirs back in the order of the merge."""
    seen = _answering(monkeypatch)
    model, batch = _trained(0)
    shuffled, order = _mlp(0), torch.randperm(16)
    shuffled.load_state_dict(model.state_dict())
    with torch.no_grad():
        shuffled[0].weight.copy_(model[0].weight[order])
        shuffled[0].bias.copy_(model[0].bias[order])
        shuffled[2].weight.copy_(model[2].weight[:, order])
    merged = fedmerge.merge([model, shuffled], "rebasin+sequential_refit", clients=[[batch], [batch]], example=batch[0])
    compared = [(question, own) for question, own in seen if question.compares]
    assert compared
    for question, own in compared:
        torch.testing.assert_close(own[0].weight, question.base["0.weight"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(merged(batch[0]), model(batch[0]), atol=1e-3, rtol=1e-3)
    assert all(not question.own for question, _ in seen if not question.compares)


def test_the_head_is_left_and_every_other_matrix_has_one_exchange(monkeypatch):
    seen = _answering(monkeypatch)
    models = [_mlp(0), _mlp(0)]
    fedmerge.merge(models, "fedavg+sequential_refit", clients=[[_batch(40, 1)], [_batch(40, 2)]])
    asked = [kind.layers for question, _ in seen for kind in question.needs]
    assert asked == [("0.weight",)] * 2 + [("2.weight",)] * 2
    assert all(own is models[i % 2] for i, (_, own) in enumerate(seen))


def test_a_harmful_refit_is_declined():
    """A client that hardly weighs in the merge, with a model that has learnt nothing and most of the data."""
    (good, batch), bad = _trained(0), _mlp(7)
    with torch.no_grad():
        for parameter in bad.parameters():
            parameter.mul_(5)
    merged = fedmerge.merge(
        [good, bad], "fedavg+sequential_refit", weights=[1, 1e-9], clients=[[batch], [_batch(2000, 5)]]
    )
    for name, tensor in good.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, atol=1e-5, rtol=1e-5)


def test_a_helpful_refit_is_taken():
    """Models that were tuned apart from one start: the mean of both is off, the refit is better on unseen data."""
    torch.manual_seed(0)
    pairs = [_trained(0), _trained(0)]
    for k, (model, (x, y)) in enumerate(pairs):
        own = (y == 2 * k) | (y == 1)
        optimiser = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(80):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[own]), y[own]).backward()
            optimiser.step()
        pairs[k] = (model, (x[own], y[own]))
    models, loaders, (x, y) = [model for model, _ in pairs], [[batch] for _, batch in pairs], _batch(1000, 9)

    def loss(method: str) -> float:
        return float(nn.functional.cross_entropy(fedmerge.merge(models, method, clients=loaders)(x), y).detach())

    assert loss("fedavg+sequential_refit(head=true)") < 0.9 * loss("fedavg")


def test_layers_that_no_matrix_describes_are_passed_over():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 5))
    x, y = torch.randint(5, (40, 3)), torch.randint(5, (40,))
    merged = fedmerge.merge([model, model], "fedavg+sequential_refit", clients=[[(x, y)], [(x, y)]])
    torch.testing.assert_close(merged(x), model(x), atol=1e-4, rtol=1e-4)
    assert [step.weight for step in SequentialRefit().steps(model.state_dict())] == ["0.weight", "2.weight"]
    assert SequentialRefit().steps(nn.Linear(2, 2).state_dict()) == ()


def test_clients_that_kept_no_model_cannot_compare():
    state, _ = module_state(_mlp(0))
    question = Question(state, needs=(RefitSums(),))
    with pytest.raises(InvalidOption, match="kept none"):
        respond(question, _mlp(0), [_batch(20, 0)])
    with pytest.raises(InvalidOption, match=r"call compare\(\)"):
        fedmerge.compute_statistics(_mlp(0), [_batch(20, 0)], ["refit_sums"])


@pytest.mark.parametrize(
    ("mend", "what"),
    [
        (lambda value: value.pop("2.weight.Z"), "want S and Z"),
        (lambda value: value.update({"2.weight.Z": torch.ones(11, 16)}), "has shape"),
        (lambda value: value.update({"2.weight.S": -torch.eye(16)}), "negative diagonal"),
    ],
)
def test_sums_that_cannot_be_are_refused(mend, what):
    model = _mlp(0)
    value = dict(RefitSums(layers=("2.weight",)).compare(model, model, [_batch(20, 0)]))
    RefitSums().check(value, model.state_dict())
    mend(value)
    with pytest.raises(InvalidOption, match=what):
        RefitSums().check(value, model.state_dict())
