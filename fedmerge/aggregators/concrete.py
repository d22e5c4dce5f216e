"""Concrete subspace learning: a mask of the merged update, learnt through a relaxation of its bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedmerge.aggregators.searched import Searched, shares
from fedmerge.errors import InvalidOption
from fedmerge.lookup.option_checks import check_range, check_word
from fedmerge.registry import register
from fedmerge.searching.search import Problem, Search, Span, Trial, task_vectors
from fedmerge.seeding import torch_generator
from fedmerge.state import State
from fedmerge.statistics import EntropyGradient, LossGradient, Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Concrete", "masked"]


@register("concrete", paper="arXiv:2312.06173")
@dataclass(frozen=True)
class Concrete(Searched):
    """Task arithmetic in a subspace: one mask of all parameters, shared by the clients' updates, learnt by gradient.

    Tang et al. 2023, algorithm 1: ``theta = theta_0 + lambda sum_i m / mean(m) * tau_i``, mean(m) being that of a
    tensor. The mask has a logit x for each parameter; in training its bits are drawn from a relaxed Bernoulli
    (concrete) distribution, ``m = sigmoid((x + log u - log(1 - u)) / temperature)``, u uniform, and Adam moves x
    against the mean gradient, one draw a step. A mask that is the same everywhere leaves the merge as it is. The
    gradient at a model is a sum over clients, each of which sends one as large as its model in every step, and learns
    nothing of the others; or the server takes it on its own data. The authors draw the last mask as well; here it is
    the distribution's median, ``sigmoid(x / temperature)``, so that nothing of the result is left to chance. They take
    2000 steps of 1e-3 on batches of 16 by entropy; here a step's gradient is that of all examples.

    Parameters
    ----------
    scale
        lambda, of every update; the clients' shares of the examples, which is FedAvg, where not given. 0.3 in the
        paper.
    temperature
        Of the relaxation, above 0.
    learning_rate
        Of Adam, above 0: about what a logit moves in a step.
    objective
        ``"loss"``; ``"entropy"``, for classifiers; or ``"auto"``: loss where those who judge have labels.
    evaluations, judge
        Steps; who measures. See :class:`~fedmerge.aggregators.searched.Searched`.

    Examples
    --------
    >>> import fedmerge
    >>> from torch import nn
    >>> net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> merged = fedmerge.merge([net, other], "concrete", base=other, data=torch.randn(8, 2), evaluations=3)
    """

    requires_base: ClassVar[bool] = True
    unlabelled: ClassVar[bool] = True

    scale: float | None = None
    temperature: float = 0.5
    learning_rate: float = 0.1
    objective: Literal["auto", "loss", "entropy"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None:
            check_range(self, "scale", 0.0, float("inf"), open_high=True)
        check_range(self, "temperature", 1e-6, float("inf"), open_high=True)
        check_range(self, "learning_rate", 1e-12, float("inf"), open_high=True)
        check_word(self, "objective", ("auto", "loss", "entropy"))

    @property
    def measured_in_search(self) -> tuple[Statistic, ...]:
        """The gradient of the objective."""
        return (EntropyGradient() if self.objective == "entropy" else LossGradient(),)

    def span(self, updates: Sequence[ClientUpdate], context: MergeContext, memory: State) -> Span:
        """The model sent out, and the merged update: a mask that is shared needs no more."""
        base, factors = context.required_base("concrete"), shares(updates)
        if self.scale is not None:
            factors = torch.full_like(factors, self.scale)
        total: dict[str, Tensor] = {}
        for factor, update in zip(factors.tolist(), updates, strict=True):
            for name, change in task_vectors([update.state], base)[0].items():
                total[name] = factor * change if name not in total else total[name].add_(change, alpha=factor)
        return Span(base, (total,), torch.ones(1, dtype=torch.float64))

    def search(self, problem: Problem) -> Search:
        """Adam on the mask's logits; the parameters under its median."""
        if problem.span is None:
            raise InvalidOption("concrete searches among models, and has not been told of any")
        origin, (update,) = problem.span.origin, problem.span.directions
        entropy = self.objective == "entropy" or (self.objective == "auto" and not problem.labelled)
        measured = EntropyGradient() if entropy else LossGradient()
        draw = torch_generator(problem.seed, "mask")
        logits = {name: torch.zeros_like(tensor, requires_grad=True) for name, tensor in update.items()}
        optimizer = torch.optim.Adam(list(logits.values()), lr=self.learning_rate)
        for _ in range(self.evaluations):
            noise = {name: _logistic(tensor, draw) for name, tensor in update.items()}
            with torch.enable_grad():
                point = masked(origin, update, {n: (x + noise[n]) / self.temperature for n, x in logits.items()})
            there = {name: tensor.detach() for name, tensor in point.items()}
            judged = yield Trial(problem.start[None], measured, state=there)
            slopes = judged.gradient or {}
            if not all(bool(slope.isfinite().all()) for slope in slopes.values()):
                break
            for name, x in logits.items():
                slope = slopes.get(name)
                x.grad = None if slope is None else torch.autograd.grad(point[name], x, slope.to(point[name]))[0]
            optimizer.step()
        return masked(origin, update, {n: x.detach() / self.temperature for n, x in logits.items()})


def masked(origin: State, update: State, logits: State) -> dict[str, Tensor]:
    """``origin + m / mean(m) * update`` with ``m = sigmoid(logits)``, tensor by tensor.

    Examples
    --------
    >>> masked({"w": torch.zeros(2)}, {"w": torch.ones(2)}, {"w": torch.tensor([0.0, -1e3])})["w"]
    tensor([2., 0.], dtype=torch.float64)
    """
    moved = {}
    for name, change in update.items():
        mask = logits[name].double().sigmoid()
        moved[name] = origin[name].double() + mask / mask.mean().clamp_min(1e-12) * change.double()
    return moved


def _logistic(like: Tensor, draw: torch.Generator) -> Tensor:
    u = torch.rand(like.shape, generator=draw, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return (u.log() - (-u).log1p()).to(like.device)
