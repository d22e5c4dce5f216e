"""Curvature, gradients and sums of every kind of task, against autograd example by example."""

from __future__ import annotations

import pytest
import torch
from brute_force import by_position, patches
from likelihoods import KINDS, loss, made, vectors
from torch import nn

from fedmerge.errors import TaskError
from fedmerge.offline.compute import compute_statistics
from fedmerge.statistics import ClassCounts, FisherDiag, FisherKfac, HeadGradient, HeadSums, LossGradient, Secants
from fedmerge.tasks import Classification

every_kind = pytest.mark.parametrize("kind", KINDS)


def _close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)


def _gradients(model, output, vector):
    found = torch.autograd.grad(
        output, list(model.parameters()), vector, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(dict(model.named_parameters()), found, strict=True))


@every_kind
def test_the_diagonal_is_the_expected_square_of_each_examples_score(kind):
    task, model, x, y = made(kind)
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for one, target in zip(x, y, strict=True):
        output = model(one[None])
        for vector in vectors(task, output[0], target):
            for name, gradient in _gradients(model, output, vector[None]).items():
                wanted[name] += gradient.square() / len(x)
    found = compute_statistics(model, [(x, y)], [FisherDiag(estimator="exact")])["fisher_diag"]
    assert sum(float(tensor.sum()) for tensor in found.values()) > 0
    for name, tensor in wanted.items():
        _close(found[name], tensor)


@every_kind
def test_batches_and_a_task_that_is_told_change_nothing(kind):
    task, model, x, y = made(kind)
    whole = compute_statistics(model, [(x, y)], ["fisher_diag"])["fisher_diag"]
    batches = list(zip(x.split(1), y.split(1), strict=True))
    told = compute_statistics(model, batches, ["fisher_diag"], task=task)["fisher_diag"]
    for name, tensor in whole.items():
        _close(told[name], tensor)


@every_kind
def test_kronecker_factors_are_those_of_each_examples_scores(kind):
    task, model, x, y = made(kind)
    name, module = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
    seen = {}
    handle = module.register_forward_hook(lambda _, inputs, output: seen.update(a=inputs[0], z=output))
    inner = outer = 0
    for one, target in zip(x, y, strict=True):
        output = model(one[None])
        rows = patches(module, seen["a"]).detach()
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
        inner = inner + rows.T @ rows / len(x)
        for vector in vectors(task, output[0], target):
            (gradient,) = torch.autograd.grad(output, seen["z"], vector[None], retain_graph=True)
            g = by_position(module, gradient)
            outer = outer + g.T @ g / (len(x) * len(rows))
    handle.remove()
    found = compute_statistics(model, [(x, y)], [FisherKfac(estimator="exact")])["fisher_kfac"]
    weight = f"{name}.weight" if name else "weight"
    _close(found[f"{weight}.A"], inner)
    _close(found[f"{weight}.G"], outer)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "tokens" not in kind])  # a GRU is slow
def test_labels_that_are_drawn_have_the_expected_curvature(kind):
    _, model, x, y = made(kind)
    x, y = x.repeat(300, *[1] * (x.ndim - 1)), y.repeat(300, *[1] * (y.ndim - 1))
    exact = FisherDiag(estimator="exact").measure(model, [(x, y)], None)
    drawn = FisherDiag(estimator="sampled").measure(model, [(x, y)], None)
    for name, tensor in exact.items():
        assert (drawn[name] - tensor).norm() <= 0.25 * tensor.norm()
    assert any(not torch.equal(drawn[name], tensor) for name, tensor in exact.items())


@every_kind
def test_the_empirical_fisher_is_that_of_the_targets_given(kind):
    task, model, x, y = made(kind)
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for one, target in zip(x, y, strict=True):
        found = torch.autograd.grad(loss(task, model(one[None])[0], target), list(model.parameters()))
        for name, gradient in zip(wanted, found, strict=True):
            wanted[name] += gradient.square() / len(x)
    found = FisherDiag(estimator="empirical").measure(model, [(x, y)], None)
    for name, tensor in wanted.items():
        _close(found[name], tensor)


@every_kind
def test_the_gradient_is_that_of_the_loss_per_label(kind):
    task, model, x, y = made(kind)
    total = sum(loss(task, model(one[None])[0], target) for one, target in zip(x, y, strict=True)) / y.numel()
    wanted = torch.autograd.grad(total, list(model.parameters()))
    found = LossGradient().measure(model, list(zip(x.split(2), y.split(2), strict=True)), None)
    for name, gradient in zip(dict(model.named_parameters()), wanted, strict=True):
        _close(found[name], gradient)


@every_kind
def test_slope_and_curvature_along_directions_are_those_of_the_likelihood(kind):
    task, model, x, y = made(kind)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        directions = [{n: torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(2)]
    slope, curvature = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    for one, target in zip(x, y, strict=True):
        output = model(one[None])
        (residual,) = torch.autograd.grad(loss(task, leaf := output[0].detach().requires_grad_(), target), leaf)
        along = [_along(_gradients(model, output, residual[None]), direction) for direction in directions]
        slope += torch.stack(along) / y.numel()
        for vector in vectors(task, output[0], target):
            row = torch.stack([_along(_gradients(model, output, vector[None]), d) for d in directions])
            curvature += torch.outer(row, row) / y.numel()
    found = Secants(reach=1e-7).along(model, directions, [(x, y)])
    torch.testing.assert_close(found["slope"], slope, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["curvature"], curvature, rtol=1e-4, atol=1e-6)


def _along(gradient, direction):
    return sum((gradient[name] * step).sum() for name, step in direction.items())


HEADS = ["regression", "regression of columns", "one number without an axis", "one logit", "several labels",
         "padded tokens"]  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
def test_the_heads_gradient_and_fisher_are_those_of_the_likelihood(kind):
    task, model, x, y = made(kind)
    weight = list(model.state_dict())[-2]
    total = sum(loss(task, model(one[None])[0], target) for one, target in zip(x, y, strict=True))
    gradients = torch.autograd.grad(total, list(model.parameters())[-2:])
    found = HeadGradient().measure(model, [(x, y)], None)
    labels = y.numel() if kind == "padded tokens" else len(y)
    _close(found[f"{weight}.gradient"], torch.cat([gradients[0], gradients[1][:, None]], 1) / labels)
    outer = 0
    for one, target in zip(x, y, strict=True):
        for vector in vectors(task, model(one[None])[0], target):
            rows = vector.reshape(-1, len(gradients[1]))
            outer = outer + rows.T @ rows / labels
    _close(found[f"{weight}.G"], outer)


def test_the_heads_sums_give_the_least_squares_fit_of_a_regression():
    _, model, x, y = made("regression")
    found = HeadSums().measure(model, [(x, y)], None)
    fitted = torch.linalg.solve(found["weight.S"], found["weight.C"].T).T
    _close(fitted, torch.tensor([[2.0, 2.0, 2.0, 2.0, 0.0]], dtype=torch.float64))


def test_padding_is_in_none_of_the_heads_sums():
    _, model, tokens, labels = made("padded tokens")
    found = HeadSums().measure(model, [(tokens, labels)], None)
    changed = tokens.clone()
    changed[1] = 5  # an example without a label that counts
    for name, tensor in HeadSums().measure(model, [(changed, labels)], None).items():
        _close(tensor, found[name])
    assert float(found["out.weight.C"].sum(1)[labels[labels >= 0].unique()].abs().min()) > 0


def test_counts_of_classes_leave_out_what_is_ignored_and_heed_the_class_axis():
    _, model, x, y = made("segmentation with ignored pixels")
    counts = ClassCounts().measure(model, [(x, y)], None)["class_counts"]
    assert counts.tolist() == [int((y == c).sum()) for c in range(3)]
    for kind in ("regression of columns", "several labels"):  # every example tells about every output
        _, model, x, y = made(kind)
        found = ClassCounts().measure(model, list(zip(x.split(2), y.split(2), strict=True)), None)["class_counts"]
        assert found.tolist() == [len(x)] * y.shape[1]


def test_a_batch_without_any_label_that_counts_adds_nothing_but_examples():
    _, model, x, y = made("segmentation")
    padding = torch.full_like(y, -100)
    for kind in (FisherDiag(), FisherDiag(estimator="sampled"), FisherDiag(estimator="empirical")):
        alone, beside = (kind.measure(model, batches, None) for batches in ([(x, y)], [(x, y), (x, padding)]))
        for name, tensor in alone.items():
            torch.testing.assert_close(
                2 * beside[name], tensor, rtol=0.2 if kind.estimator == "sampled" else 1e-6, atol=1e-9
            )
    nothing = LossGradient().measure(model, [(x, padding)], None)
    assert not any(bool(tensor.any()) for tensor in nothing.values())


def test_label_smoothing_moves_the_gradient_and_leaves_the_curvature():
    _, model, x, y = made("segmentation")
    smooth = nn.CrossEntropyLoss(label_smoothing=0.3)
    plain, told = (compute_statistics(model, [(x, y)], ["fisher_diag"], task=task) for task in (None, smooth))
    _close(told["fisher_diag"]["0.weight"], plain["fisher_diag"]["0.weight"])
    found = LossGradient(task=Classification(label_smoothing=0.3)).measure(model, [(x, y)], None)
    wanted = torch.autograd.grad(smooth(model(x), y), list(model.parameters()))
    _close(found["0.weight"], wanted[0])


def test_weighted_classes_have_the_fisher_of_their_weighted_likelihood():
    _, model, x, y = made("segmentation")
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    wanted = 0
    for one, target in zip(x, y, strict=True):
        each = nn.functional.cross_entropy(model(one[None]), target[None], weight=weights, reduction="sum")
        wanted = wanted + torch.autograd.grad(each, model[0].weight)[0].square() / len(x)
    loss = nn.CrossEntropyLoss(weight=weights)
    found = compute_statistics(model, [(x, y)], [FisherDiag(estimator="empirical")], loss=loss)
    _close(found["fisher_diag"]["0.weight"], wanted)
    logits = model(x).detach()
    vectors = [weights[y].sqrt()[:, None] * v for v in Classification().exact(logits, y)]
    wanted = 0
    for i in range(len(x)):
        for vector in vectors:
            output = model(x[i : i + 1])
            wanted = wanted + torch.autograd.grad(output, model[0].weight, vector[i : i + 1])[0].square() / len(x)
    found = compute_statistics(model, [(x, y)], [FisherDiag(estimator="exact")], loss=loss)
    _close(found["fisher_diag"]["0.weight"], wanted)


def test_outputs_that_are_not_one_row_per_example_have_no_fisher():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.Flatten(0, 1))
    tokens, labels = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    with pytest.raises(TaskError, match="single examples"):
        compute_statistics(model, [(tokens, labels)], ["fisher_diag"])


class Squeezing(nn.Module):
    """Drops every axis of size 1: that of the examples too, where a batch has only one."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).squeeze()


def test_a_batch_of_one_example_may_lose_its_axis():
    _, model, x, y = made("regression")
    directions = [{name: torch.ones_like(p) for name, p in model.named_parameters()}]
    squeezed = [{f"net.{name}": step for name, step in directions[0].items()}]
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    for kind in (FisherDiag(), FisherKfac(), LossGradient(), HeadSums(), HeadGradient()):
        wanted, found = (kind.measure(net, batches, None) for net in (model, Squeezing(model)))
        for name, tensor in wanted.items():
            _close(found[f"net.{name}"], tensor)
    wanted, found = Secants().along(model, directions, batches), Secants().along(Squeezing(model), squeezed, batches)
    _close(found["slope"], wanted["slope"])
