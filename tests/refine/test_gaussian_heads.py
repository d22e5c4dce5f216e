"""Heads from moments by class: beside scikit-learn on the pooled features, from clients of unlike labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.naive_bayes import GaussianNB
from torch import nn

import fedmerge
from fedmerge.errors import InvalidOption, TaskError
from fedmerge.questions import Question, pooled, respond
from fedmerge.refine import GaussianHead
from fedmerge.refine.class_gaussians import ClassGaussians, lda_weights, linear_like
from fedmerge.statistics import ClassMoments, HeadSums


def blobs(n=240, d=3):
    """Three classes of unequal size and shape, sorted by class, so that clients cut of it have unlike labels."""
    random = np.random.default_rng(4)
    y = np.sort(random.choice(3, n, p=[0.5, 0.3, 0.2]))
    shapes = random.normal(size=(3, d, d))
    x = np.einsum("nij,nj->ni", shapes[y], random.normal(size=(n, d))) + 2.5 * random.normal(size=(3, d))[y]
    return torch.from_numpy(x), torch.from_numpy(y)


X, Y = blobs()
CLIENTS = [[(X[a:b], Y[a:b])] for a, b in ((0, 100), (100, 130), (130, 240))]


def net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), nn.Linear(3, 3, bias=bias)).double()


def summed(kind):
    """What all clients send together, of all examples."""
    module = net()
    question = Question(module.state_dict(), needs=(kind,), holdout=0)
    answers = [(i, [respond(question, module, batches)]) for i, batches in enumerate(CLIENTS)]
    return pooled([question], answers)[0].statistics[kind.name]


@pytest.mark.parametrize(("solver", "shrinkage"), [("lsqr", None), ("eigen", None), ("lsqr", 0.3)])
def test_lda_is_that_of_scikit_learn_on_pooled_features(solver, shrinkage):
    sums = summed(HeadSums())
    head = lda_weights(sums["1.weight.S"], sums["1.weight.C"], shrinkage or 0.0).numpy()
    wanted = LinearDiscriminantAnalysis(solver=solver, shrinkage=shrinkage).fit(X.numpy(), Y.numpy())
    got = X.numpy() @ head[:, :-1].T + head[:, -1]
    log_p = got - np.logaddexp.reduce(got, axis=1, keepdims=True)
    np.testing.assert_allclose(log_p, wanted.predict_log_proba(X.numpy()), atol=1e-6)
    if solver == "lsqr":
        np.testing.assert_allclose(head[:, :-1], wanted.coef_, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(head[:, -1], wanted.intercept_, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shrinkage", [0.0, 0.4])
def test_qda_is_that_of_scikit_learn_on_pooled_features(shrinkage):
    gaussians = ClassGaussians.of_moments(summed(ClassMoments())["1.weight.M"], shrinkage)
    settings = {"shrinkage": shrinkage} if shrinkage else {"covariance_estimator": EmpiricalCovariance()}
    wanted = QuadraticDiscriminantAnalysis(solver="eigen", **settings).fit(X.numpy(), Y.numpy())
    got = gaussians.log_joint(X).log_softmax(1)
    np.testing.assert_allclose(got.numpy(), wanted.predict_log_proba(X.numpy()), atol=1e-6)


@pytest.mark.parametrize("smoothing", [1e-9, 0.05])
def test_naive_bayes_is_that_of_scikit_learn_on_pooled_features(smoothing):
    sums = summed(ClassMoments(diagonal=True))
    gaussians = ClassGaussians.of_squares(sums["1.weight.C"], sums["1.weight.D"], smoothing)
    wanted = GaussianNB(var_smoothing=smoothing).fit(X.numpy(), Y.numpy())
    np.testing.assert_allclose(gaussians.means.numpy(), wanted.theta_, atol=1e-9)
    np.testing.assert_allclose(gaussians.covariances.numpy(), wanted.var_, atol=1e-9)
    got = gaussians.log_joint(X).log_softmax(1)
    np.testing.assert_allclose(got.numpy(), wanted.predict_log_proba(X.numpy()), atol=1e-6)


def test_moments_hold_what_the_diagonal_ones_do_and_add_up_to_those_of_the_head():
    full, squares, head = summed(ClassMoments()), summed(ClassMoments(diagonal=True)), summed(HeadSums())
    moments = full["1.weight.M"]
    torch.testing.assert_close(moments[:, -1], squares["1.weight.C"])
    torch.testing.assert_close(moments.diagonal(dim1=1, dim2=2), squares["1.weight.D"])
    torch.testing.assert_close(moments.sum(0), head["1.weight.S"])
    torch.testing.assert_close(squares["1.weight.C"], head["1.weight.C"])


def test_a_class_that_nobody_has_is_never_chosen_and_makes_no_nan():
    moments = torch.cat([summed(ClassMoments())["1.weight.M"], torch.zeros(1, 4, 4)])
    gaussians = ClassGaussians.of_moments(moments, 0.01)
    decided = gaussians.log_joint(X)
    assert bool(decided.isfinite().all())
    assert 3 not in decided.argmax(1).tolist()
    assert bool(linear_like(gaussians, 20, torch.Generator().manual_seed(0)).isfinite().all())


def test_drawn_features_have_the_moments_that_they_are_drawn_from():
    gaussians = ClassGaussians.of_moments(summed(ClassMoments())["1.weight.M"])
    drawn = gaussians.sample(20000, torch.Generator().manual_seed(0))
    for c in range(3):
        torch.testing.assert_close(drawn[c].mean(0), gaussians.means[c], atol=0.1, rtol=0)
        torch.testing.assert_close(drawn[c].T.cov(), gaussians.covariances[c], atol=0.3, rtol=0.1)


def test_of_equal_covariances_the_fitted_head_decides_as_lda_does():
    means, covariance = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 2.0]]).double(), torch.eye(2).double()
    priors = torch.tensor([0.2, 0.3, 0.5]).double()
    gaussians = ClassGaussians(priors, means, covariance.expand(3, 2, 2).clone())
    head = linear_like(gaussians, 4000, torch.Generator().manual_seed(0))
    points = gaussians.sample(300, torch.Generator().manual_seed(1)).flatten(0, 1)
    decided = (points @ head[:, :-1].T + head[:, -1]).argmax(1)
    assert float((decided == gaussians.log_joint(points).argmax(1)).double().mean()) > 0.97


@pytest.mark.parametrize("classifier", ["lda", "naive_bayes", "qda"])
def test_the_method_gives_the_head_and_averages_the_rest(classifier):
    models = [net(), net(), net()]
    with torch.no_grad():
        for i, model in enumerate(models):
            model[1].weight.add_(i)
    found = fedmerge.merge(models, "gaussian_heads", classifier=classifier, clients=CLIENTS, seed=1)
    accuracy = [float((m(X).argmax(1) == Y).double().mean()) for m in (found, fedmerge.merge(models))]
    assert accuracy[0] > max(0.75, accuracy[1])
    again = fedmerge.merge(models, "gaussian_heads", classifier=classifier, clients=CLIENTS, seed=2)
    assert torch.equal(found[1].weight, again[1].weight)
    if classifier == "lda":  # one example of ten judges and is not measured
        kept = torch.cat(
            [torch.arange(a, b)[torch.arange(b - a) % 10 != 0] for a, b in ((0, 100), (100, 130), (130, 240))]
        )
        wanted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.01).fit(X[kept].numpy(), Y[kept].numpy())
        ratio = found[1].weight.detach().numpy() / wanted.coef_
        np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)
        assert min(abs(ratio[0, 0] - scale) for scale in (1.0, 0.5, 0.25, 0.125)) < 1e-4


def test_heads_for_which_there_is_none_are_left_as_they_are(caplog):
    model = net(bias=False)
    found = fedmerge.merge([model] * 3, "gaussian_heads", clients=CLIENTS)
    assert torch.equal(found[1].weight, model[1].weight)
    assert "no bias" in caplog.text
    with pytest.raises(TaskError, match="no classes"):
        ClassMoments().measure(nn.Linear(2, 1), [(torch.zeros(3, 2), torch.tensor([0.5, 2.0, 7.0]))], None)
    with pytest.raises(InvalidOption, match="classifier"):
        GaussianHead(classifier="knn")
    with pytest.raises(InvalidOption, match="pass clients="):
        fedmerge.merge([model] * 2, "gaussian_heads")


@pytest.mark.parametrize("diagonal", [True, False])
def test_moments_of_other_shapes_are_refused(diagonal):
    kind, state = ClassMoments(diagonal=diagonal), net().state_dict()
    value = kind.measure(net(), CLIENTS[0], None)
    kind.check(value, state)
    with pytest.raises(InvalidOption, match="want"):
        kind.check({name: tensor[:2] for name, tensor in value.items()}, state)
    with pytest.raises(InvalidOption, match="bias"):
        kind.check(value, {"1.weight": state["1.weight"]})
