"""Every method on tasks that are no classification: it does what it claims, or refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedmerge
from fedmerge.aggregators.fedsa_lora import FedSaLora
from fedmerge.aggregators.pair_rule import PairRule
from fedmerge.errors import FedMergeError, InvalidOption, TaskError
from fedmerge.registry import build, entries, entry

# There is no norm to recalibrate, and layers refitted without labels are judged no better here.
OF_LABELS_LATER = sorted(
    set(entries("refinement")) - {"recalibrate", "sequential_refit", "prefix_regmean", "surgery", "gaussian_head"}
)
OF_CLASSES = ["gaussian_heads", "fedavg+gaussian_head"]
REFINED = [f"fedavg+{name}" for name in OF_LABELS_LATER]
LOCAL = [name for name in fedmerge.methods() if build("aggregator", name, {}).local_rule]
# The average of two is one until somebody is subtracted; the shared model of the third is, and its clients' are not.
AVERAGES = ("fedavg", "task_arithmetic", "tall_masks")
OF_PAIRS = [name for name in fedmerge.methods() if issubclass(entry("aggregator", name).cls, (PairRule, FedSaLora))]
"""Rules for low-rank pairs, of which the net here has none; they look at no outputs."""
METHODS = [name for name in fedmerge.methods() if name not in (*AVERAGES, *LOCAL, *OF_CLASSES, *OF_PAIRS)] + REFINED
LOSSES = {"regression": F.mse_loss, "binary": F.binary_cross_entropy_with_logits}
OF_LABELS = [
    *(name for name in fedmerge.methods() if any(need.of_labels for need in build("aggregator", name, {}).needs)),
    *REFINED,
]


@pytest.fixture(scope="module", params=LOSSES)
def problem(request):
    """Three clients with unlike inputs, a small net that each has trained from a start of its own, and one of these."""
    loss = LOSSES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        x = torch.randn(300, 4)
        y = (x.sum(1) + x[:, 0] * x[:, 1])[:, None]
        y = y if request.param == "regression" else (y > 0).float()
        starts = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)) for _ in range(3)]
        models, loaders = [], []
        for start, rows in zip(starts, torch.argsort(x[:, 0]).split((80, 100, 120)), strict=True):
            model = copy.deepcopy(start)
            optimizer = torch.optim.Adam(model.parameters(), 0.03)
            for _ in range(80):
                optimizer.zero_grad()
                loss(model(x[rows]), y[rows]).backward()
                optimizer.step()
            models.append(model)
            loaders.append([(x[rows], y[rows])])
    return request.param, models, loaders, starts[0]


def _vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def _merged(problem, method, **options):
    _, models, loaders, base = problem
    steps = [{"local_steps": 2 * (i + 1)} for i in range(len(models))]
    known = {"statistics": steps} if method == "fednova" else {}
    examples = [len(batches[0][0]) for batches in loaders]
    return fedmerge.merge(
        models, method, weights=examples, base=base, clients=loaders, data=loaders[0], example=loaders[0][0][0][:2],
        **known, **options,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_method_on_one_output_is_not_fedavg(problem, method):
    average, found = _vector(_merged(problem, "fedavg")), _vector(_merged(problem, method, task=problem[0]))
    assert bool(found.isfinite().all())
    assert found.shape != average.shape or float((found - average).norm()) > 1e-3 * float(average.norm())


@pytest.mark.parametrize("method", OF_CLASSES)
@pytest.mark.parametrize("classifier", ["lda", "qda"])
def test_a_classifier_is_refused_where_there_are_no_classes(problem, method, classifier):
    with pytest.raises(FedMergeError, match=r"class"):
        _merged(problem, f"{method}(classifier={classifier})", task=problem[0])


@pytest.mark.parametrize("method", LOCAL)
def test_a_method_that_changes_training_refuses_models_that_are_trained(problem, method):
    with pytest.raises(InvalidOption, match="fedavg"):
        _merged(problem, method, task=problem[0])


@pytest.mark.parametrize("method", ["fedkfac", *(name for name in REFINED if "analytic" not in name)])
def test_steps_that_clients_judge_serve_the_loss_of_the_task(problem, method):
    name, _, loaders, _ = problem
    x, y = (torch.cat([batches[0][i] for batches in loaders]) for i in (0, 1))

    def loss(model):
        return float(LOSSES[name](model(x), y).detach())

    assert loss(_merged(problem, method, task=name)) < 0.9 * loss(_merged(problem, "fedavg"))


@pytest.mark.parametrize("method", OF_LABELS)
def test_what_is_unclear_is_refused_and_not_averaged(problem, method):
    _, models, loaders, base = problem
    between = [[(x, y.sigmoid()) for x, y in batches] for batches in loaders]
    with pytest.raises(TaskError, match="task="):
        _merged(("unclear", models, between, base), method)


@pytest.mark.parametrize("method", ["fisher", "maecho", "fedma", "fedavg+natural_gradient"])
def test_a_task_that_is_read_gives_what_one_that_is_told_gives(problem, method):
    told, read = _vector(_merged(problem, method, task=problem[0])), _vector(_merged(problem, method))
    torch.testing.assert_close(read, told, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fedfisher", {"damping": 1e-9, "normalize": 0.0}),
        ("mats", {}),
        ("fedavg+ridge_head(ridge=1e-10)", {}),
    ],
)
def test_linear_regressions_merge_to_that_of_all_data(method, options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(120, 3, dtype=torch.float64)
        y = 3 * x[:, :1] + x[:, 1:2].square() + 0.1 * torch.randn(120, 1, dtype=torch.float64)
    rows = torch.argsort(x[:, 1]).split((30, 40, 50))
    models = [_least_squares(x[k], y[k]) for k in rows]
    found = fedmerge.merge(
        models, method, weights=[len(k) for k in rows], clients=[[(x[k], y[k])] for k in rows], **options
    )
    if "+" in method:  # one example of ten judges and is not measured
        rows = [torch.cat([k[i : i + 10][1:] for i in range(0, len(k), 10)]) for k in rows]
    wanted = _vector(_least_squares(x[torch.cat(rows)], y[torch.cat(rows)]))
    average = _vector(fedmerge.merge(models, weights=[30, 40, 50]))
    assert float((average - wanted).norm()) > 0.3
    torch.testing.assert_close(_vector(found), wanted, rtol=1e-4, atol=1e-4)


def _least_squares(x, y):
    model = nn.Linear(3, 1, dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1), y).solution
    with torch.no_grad():
        model.weight.copy_(solution[:3].T)
        model.bias.copy_(solution[3])
    return model
