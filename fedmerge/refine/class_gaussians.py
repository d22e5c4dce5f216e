"""Features as one Gaussian per class: what classifiers these give, from sums over clients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ClassGaussians", "lda_weights", "linear_like"]

_RARE = 1e-6
"""Prior of a class that nobody has: it is never chosen, and its logit stays finite."""
_STEPS = 100


@dataclass(frozen=True)
class ClassGaussians:
    """``h | c ~ N(mean_c, covariance_c)``, maximum likelihood.

    Parameters
    ----------
    priors
        [C], adding up to 1.
    means
        [C, d].
    covariances
        [C, d, d]; or variances [C, d], where features are independent.

    Examples
    --------
    >>> gaussians = ClassGaussians(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))
    >>> gaussians.log_joint(torch.tensor([[0.0]])).softmax(1)
    tensor([[0.5000, 0.5000]])
    """

    priors: Tensor
    means: Tensor
    covariances: Tensor

    @classmethod
    def of_moments(cls, moments: Tensor, shrinkage: float = 0.0) -> ClassGaussians:
        """From :class:`~fedmerge.statistics.ClassMoments` M [C, d + 1, d + 1]; quadratic discriminant analysis.

        Each covariance is shrunk towards ``tr(S) / d I`` by a share `shrinkage`.
        """
        m = moments.double()
        priors, means = _counted(m[:, -1, -1], m[:, -1, :-1])
        second = m[:, :-1, :-1] / m[:, -1, -1].clamp_min(1e-300)[:, None, None]
        covariances = second - means[:, :, None] * means[:, None, :]
        covariances[m[:, -1, -1] <= 0] = covariances[m[:, -1, -1] > 0].mean(0)
        return cls(priors, means, shrunk(covariances, shrinkage))

    @classmethod
    def of_squares(cls, sums: Tensor, squares: Tensor, smoothing: float = 1e-9) -> ClassGaussians:
        """From C and D [C, d + 1] of the diagonal statistic; Gaussian naive Bayes.

        To every variance `smoothing` times the largest variance of all features is added.
        """
        c, d = sums.double(), squares.double()
        mass, present = c[:, -1], c[:, -1] > 0
        priors, means = _counted(mass, c[:, :-1])
        variances = (d[:, :-1] / mass.clamp_min(1e-300)[:, None] - means.square()).clamp_min(0)
        variances[~present] = variances[present].mean(0)
        total = mass.sum()
        overall = d[:, :-1].sum(0) / total - (c[:, :-1].sum(0) / total).square()
        return cls(priors, means, variances + smoothing * overall.max())

    def log_joint(self, features: Tensor) -> Tensor:
        """``log p(h, c)`` of features [n, d], up to a constant: [n, C]; the largest is what is decided."""
        away = features[:, None, :].to(self.means) - self.means
        if self.covariances.ndim == 2:
            distance = (away.square() / self.covariances).sum(2)
            volume = self.covariances.log().sum(1)
        else:
            values, vectors = torch.linalg.eigh(self.covariances)
            values = values.clamp_min(1e-12 * values.amax(1, keepdim=True))
            turned = torch.einsum("ncd,cde->nce", away, vectors)
            distance, volume = (turned.square() / values).sum(2), values.log().sum(1)
        joint: Tensor = self.priors.log() - (distance + volume) / 2
        return joint

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        """Features [C, number, d]."""
        noise = torch.randn(len(self.means), number, self.means.shape[1], dtype=torch.float64, generator=generator)
        noise = noise.to(self.means)
        if self.covariances.ndim == 2:
            return self.means[:, None] + noise * self.covariances.sqrt()[:, None]
        values, vectors = torch.linalg.eigh(self.covariances)
        roots = (vectors * values.clamp_min(0).sqrt()[:, None, :]) @ vectors.transpose(1, 2)
        drawn: Tensor = self.means[:, None] + noise @ roots
        return drawn


def lda_weights(moments: Tensor, labelled: Tensor, shrinkage: float) -> Tensor:
    """Linear discriminant analysis as a head [C, d + 1], its bias last.

    ``w_c = S^-1 mean_c`` and ``b_c = -mean_c^T S^-1 mean_c / 2 + log prior_c``, S the covariance within classes, shrunk
    towards ``tr(S) / d I`` by a share.

    Parameters
    ----------
    moments, labelled
        S [d + 1, d + 1] and C [C, d + 1] of :class:`~fedmerge.statistics.HeadSums`, with a final 1.
    shrinkage
        From 0 to 1.

    Examples
    --------
    >>> h, y = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0], [6.0, 1.0]]), torch.eye(2)[[0, 0, 1, 1]]
    >>> lda_weights(h.T @ h / 4, y.T @ h / 4, 0.0).round(decimals=4).tolist()
    [[1.0, -1.1931], [5.0, -13.1931]]
    """
    s, c = moments.double(), labelled.double()
    priors, means = _counted(c[:, -1], c[:, :-1])
    mass = c[:, -1] / c[:, -1].sum()
    within = s[:-1, :-1] / s[-1, -1] - (means * mass[:, None]).T @ means
    weights = means @ torch.linalg.pinv(shrunk(within[None], shrinkage)[0], hermitian=True)
    return torch.cat([weights, (priors.log() - (weights * means).sum(1) / 2)[:, None]], 1)


def linear_like(gaussians: ClassGaussians, samples: int, generator: torch.Generator) -> Tensor:
    """The linear head [C, d + 1] that decides most like these Gaussians: logistic regression on what is drawn of them.

    So many features are drawn of each class, and count by its prior. A ridge of 1e-4 on standardised features keeps
    classes that do not overlap from making weights endless.
    """
    drawn = gaussians.sample(samples, generator)
    classes, _, size = drawn.shape
    rows, labels = drawn.flatten(0, 1), torch.arange(classes, device=drawn.device).repeat_interleave(samples)
    middle, scale = rows.mean(0), rows.std(0, correction=0).clamp_min(1e-12)
    standard = (rows - middle) / scale
    weights = gaussians.priors.repeat_interleave(samples) / samples
    head = torch.zeros(classes, size + 1, dtype=rows.dtype, device=rows.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy(standard @ head[:, :-1].T + head[:, -1], labels, reduction="none")
        value = (weights * losses).sum() + 1e-4 * head[:, :-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    new_weight = head.detach()
    weight = new_weight[:, :-1] / scale
    return torch.cat([weight, (new_weight[:, -1] - weight @ middle)[:, None]], 1)


def shrunk(covariances: Tensor, share: float) -> Tensor:
    """``(1 - share) S + share tr(S) / d I`` of covariances [..., d, d]."""
    size = covariances.shape[-1]
    unit = covariances.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return (1 - share) * covariances + share * unit * torch.eye(
        size, dtype=covariances.dtype, device=covariances.device
    )


def _counted(mass: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Priors and means; of a class that nobody has the mean of all."""
    priors = (mass / mass.sum()).clamp_min(_RARE)
    present = mass > 0
    means = sums / mass.clamp_min(1e-300)[:, None]
    means[~present] = sums.sum(0) / mass.sum()
    return priors / priors.sum(), means
