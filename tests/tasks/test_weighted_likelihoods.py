"""Likelihoods with weights, smoothing, ignored and shifted labels: gradients, curvature and means against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedmerge
from fedmerge.errors import TaskError
from fedmerge.statistics import FisherDiag, FisherKfac, HeadGradient, HeadSums, LossGradient
from fedmerge.tasks import Binary, Classification, LanguageModel, Multilabel, Regression, task_of

WEIGHTS = (0.5, 2.0, 3.0)


def _drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def _labels(*shape, high=3, ignored=False):
    labels = torch.randint(0, high, shape, generator=_drawn(1))
    if ignored:
        labels.view(-1)[::4] = -100
    return labels


CASES = {
    "weighted classes": (Classification(class_weights=WEIGHTS), (4, 3), _labels(4)),
    "smoothed labels": (Classification(label_smoothing=0.3), (4, 3), _labels(4, ignored=True)),
    "weighted, smoothed and ignored": (
        Classification(class_weights=WEIGHTS, label_smoothing=0.2), (6, 3), _labels(6, ignored=True)),
    "weighted pixels": (Classification(class_weights=WEIGHTS), (2, 3, 2, 4), _labels(2, 2, 4, ignored=True)),
    "weighted probabilities": (
        Classification(class_weights=WEIGHTS), (4, 3), torch.rand(4, 3, generator=_drawn(2)).softmax(1)),
    "padded text": (LanguageModel(padding=0), (2, 5, 3), _labels(2, 5)),
    "shifted text": (LanguageModel(padding=0, shift=True, class_weights=WEIGHTS), (2, 5, 3), _labels(2, 5)),
    "weighted yes": (Multilabel(pos_weight=WEIGHTS), (4, 3), _labels(4, 3, high=2, ignored=True)),
    "one weighted yes": (Binary(pos_weight=(3.0,)), (4, 1), _labels(4, high=2)),
    "several numbers": (Regression(), (4, 3), torch.randn(4, 3, generator=_drawn(3))),
}  # fmt: skip

every_case = pytest.mark.parametrize("case", CASES)


def _made(case):
    task, shape, targets = CASES[case]
    targets = targets.double() if targets.is_floating_point() else targets
    return task, torch.randn(shape, generator=_drawn(4), dtype=torch.float64), targets


def _hessian(task, outputs, targets):
    size = outputs.numel()
    found = torch.autograd.functional.hessian(lambda x: task.losses(x, targets).sum(), outputs)
    return found.reshape(size, size)


@every_case
def test_the_residual_is_the_gradient_of_the_loss(case):
    task, outputs, targets = _made(case)
    leaf = outputs.clone().requires_grad_()
    task.losses(leaf, targets).sum().backward()
    assert bool(leaf.grad.any())
    torch.testing.assert_close(task.residual(outputs, targets), leaf.grad, rtol=1e-9, atol=1e-12)


@every_case
def test_curvature_is_the_hessian_of_the_loss(case):
    task, outputs, targets = _made(case)
    wanted = _hessian(task, outputs, targets)
    directions = torch.randn(2, *outputs.shape, generator=_drawn(5), dtype=torch.float64)
    found = task.curvature(outputs, targets, directions).reshape(2, -1)
    torch.testing.assert_close(found, directions.reshape(2, -1) @ wanted, rtol=1e-8, atol=1e-10)
    outer, count = torch.zeros_like(wanted), len(outputs)
    for vector in task.exact(outputs, targets):
        for i in range(count):  # one example's labels tell nothing of another's
            alone = torch.zeros_like(outputs)
            alone[i] = vector[i]
            outer += torch.outer(alone.flatten(), alone.flatten())
    torch.testing.assert_close(outer, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if case != "weighted pixels"])
def test_the_fisher_of_outputs_adds_up_over_positions(case):
    task, outputs, targets = _made(case)
    size, classes = outputs.numel() // outputs.shape[-1], outputs.shape[-1]
    blocks = _hessian(task, outputs, targets).reshape(size, classes, size, classes)
    wanted = sum(blocks[i, :, i] for i in range(size))
    torch.testing.assert_close(task.output_fisher(outputs, targets), wanted, rtol=1e-8, atol=1e-10)


@every_case
def test_drawn_labels_have_the_curvature_on_average(case):
    task, outputs, targets = _made(case)
    draws, generator = 4000, _drawn(6)
    many = outputs.repeat(draws, *[1] * (outputs.ndim - 1))
    found = task.sampled(many, targets.repeat(draws, *[1] * (targets.ndim - 1)), generator)
    found = found.reshape(draws, -1)
    wanted = _hessian(task, outputs, targets).diagonal()
    mean = found.square().mean(0)
    assert bool((mean[wanted == 0] == 0).all())
    assert float((mean - wanted).norm()) < 0.1 * float(wanted.norm())


@pytest.mark.parametrize(
    ("loss", "shape", "targets"),
    [
        (nn.CrossEntropyLoss(torch.tensor(WEIGHTS)), (6, 3), _labels(6, ignored=True)),
        (nn.CrossEntropyLoss(torch.tensor(WEIGHTS), label_smoothing=0.3), (6, 3, 2), _labels(6, 2, ignored=True)),
        (nn.CrossEntropyLoss(torch.tensor(WEIGHTS)), (6, 3), torch.rand(6, 3).softmax(1)),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(WEIGHTS)), (6, 3), _labels(6, 3, high=2).float()),
    ],
)
def test_a_weighted_loss_of_torchs_keeps_its_mean_and_has_a_likelihood(loss, shape, targets):
    outputs = torch.randn(shape, generator=_drawn(7))
    task = task_of(loss)
    torch.testing.assert_close(task.mean_loss(outputs, targets), loss(outputs, targets))
    assert isinstance(task, Classification | Binary)
    task.check(outputs, targets)
    sums = task.sums(outputs, targets)
    torch.testing.assert_close(float(sums["loss"] / sums["weight"]), float(loss(outputs, targets)), rtol=1e-6, atol=0)


def test_means_of_weighted_losses_add_up_over_batches():
    task, outputs, targets = CASES["weighted, smoothed and ignored"][0], torch.randn(9, 3), _labels(9, ignored=True)
    parts = [task.sums(o, t) for o, t in zip(outputs.split(2), targets.split(2), strict=True)]
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    assert task.figures(total)["loss"] == pytest.approx(float(task.mean_loss(outputs, targets)), rel=1e-6)
    assert total["labels"] == (targets != -100).sum()


def _net(case):
    """A linear model, whose Gauss-Newton matrix is the Hessian, and a batch."""
    task, outputs, targets = _made(case)
    x = torch.randn(len(outputs), 4, generator=_drawn(8), dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return task, nn.Linear(4, outputs.shape[1], bias=False, dtype=torch.float64), x, targets


PLAIN = [case for case in CASES if len(CASES[case][1]) == 2]


@pytest.mark.parametrize("case", PLAIN)
def test_fisher_and_gradient_of_a_linear_net_are_those_of_its_loss(case):
    task, model, x, targets = _net(case)

    def loss(weight):
        return task.losses(F.linear(x, weight), targets).sum() / len(x)

    weight = model.weight.detach()
    wanted = torch.autograd.functional.hessian(loss, weight).reshape(weight.numel(), -1)
    found = FisherDiag(estimator="exact", task=task).measure(model, [(x, targets)], None)["weight"]
    torch.testing.assert_close(found.flatten(), wanted.diagonal(), rtol=1e-8, atol=1e-10)
    gradient = LossGradient(task=task).measure(model, [(x, targets)], None)["weight"] * targets.numel() / len(x)
    torch.testing.assert_close(gradient, torch.autograd.functional.jacobian(loss, weight), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", PLAIN)
def test_kfac_of_one_example_is_the_hessian(case):
    task, model, x, targets = _net(case)
    x, targets = x[1:2], targets[1:2]
    weight = model.weight.detach()
    wanted = torch.autograd.functional.hessian(lambda w: task.losses(F.linear(x, w), targets).sum(), weight)
    found = FisherKfac(task=task).measure(model, [(x, targets)], None)
    product = torch.einsum("ac,bd->abcd", found["weight.G"], found["weight.A"])
    torch.testing.assert_close(product, wanted, rtol=1e-8, atol=1e-10)


def test_the_heads_sums_weigh_examples_as_the_loss_does():
    task, model, x, targets = _net("weighted classes")
    found = HeadSums(task=task).measure(model, [(x, targets)], None)
    share = torch.tensor(WEIGHTS, dtype=torch.float64)[targets] / len(x)
    torch.testing.assert_close(found["weight.S"], (x * share[:, None]).T @ x)
    torch.testing.assert_close(found["weight.C"], (F.one_hot(targets, 3) * share[:, None]).T @ x)


@pytest.mark.parametrize("task", [Classification(class_weights=WEIGHTS), Binary(pos_weight=(2.0,)), Regression()])
def test_noise_is_refused_where_residuals_have_no_known_bound(task):
    outputs = 3 if isinstance(task, Classification) else 1
    x, model = torch.randn(5, 4), nn.Linear(4, outputs)
    targets = torch.rand(5, 1) if isinstance(task, Regression) else torch.tensor([0, 1, 1, 0, 1])
    for kind in (HeadSums, HeadGradient):
        with pytest.raises(TaskError, match="no bound"):
            kind(task=task, clip=1.0).measure(model, [(x, targets)], None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classification(class_weights=(1.0, -1.0)), "zero or more"),
        (lambda: Classification(class_weights=(0.0, 0.0)), "zero or more"),
        (lambda: Binary(pos_weight=(0.0,)), "above 0"),
        (lambda: Classification(class_weights=(1.0, 2.0)).check(torch.zeros(2, 3), torch.tensor([0, 1])), "3 classes"),
        (lambda: Binary(pos_weight=(1.0, 2.0)).check(torch.zeros(2, 3), torch.zeros(2, 3)), "one for each"),
        (lambda: Multilabel().check(torch.zeros(3), torch.zeros(3)), '"binary"'),
        (lambda: LanguageModel().check(torch.zeros(1, 3, 5), torch.zeros(1, 3)), "no tokens"),
        (lambda: LanguageModel().check(torch.zeros(1, 3, 5), torch.full((1, 3), 7)), "from 0 to 4"),
    ],
)
def test_weights_and_targets_that_do_not_fit_are_refused(make, message):
    with pytest.raises(TaskError, match=message):
        make()


@pytest.mark.parametrize("outputs", [1, 3])
def test_one_natural_gradient_step_of_a_linear_regression_is_least_squares(outputs):
    x = torch.randn(30, 4, generator=_drawn(9), dtype=torch.float64)
    y = torch.randn(30, outputs, generator=_drawn(10), dtype=torch.float64)
    model = nn.Linear(4, outputs, dtype=torch.float64)
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    kfac = FisherKfac(task=Regression()).measure(model, batches, None)
    gradient = LossGradient(task=Regression()).measure(model, batches, None)
    slope = torch.cat([gradient["weight"], gradient["bias"][:, None]], 1) * outputs  # per example, not per number
    step = torch.linalg.solve(kfac["weight.G"], slope) @ torch.linalg.inv(kfac["weight.A"])
    moved = torch.cat([model.weight, model.bias[:, None]], 1).detach() - step
    wanted = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x[:, :1])], 1), y).solution.T
    torch.testing.assert_close(moved, wanted, rtol=1e-9, atol=1e-10)


def test_a_natural_gradient_refinement_takes_a_linear_regression_to_least_squares():
    x = torch.randn(60, 4, generator=_drawn(11), dtype=torch.float64)
    y = x @ torch.randn(4, 2, generator=_drawn(12), dtype=torch.float64) + 1
    models = [nn.Linear(4, 2, dtype=torch.float64) for _ in range(2)]
    clients = [[(x[:20], y[:20])], [(x[20:], y[20:])]]
    method = "fedavg+natural_gradient(dampings=[1e-9],count=3)"  # factors travel rounded
    merged = fedmerge.merge(models, method, weights=[20, 40], clients=clients, task="regression")
    start = fedmerge.merge(models, "fedavg", weights=[20, 40])
    losses = [float(F.mse_loss(model(x), y)) for model in (start, merged)]
    assert losses[1] < 1e-3 * losses[0]
