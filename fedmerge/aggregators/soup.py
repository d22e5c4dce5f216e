"""Model soups: uniform, or greedy by what the server's examples say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator, Separable, ServerData
from fedmerge.lookup.option_checks import check_word
from fedmerge.registry import register
from fedmerge.state import State, WeightedSum, accumulator_dtype
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["Soup"]


@register("soup", paper="arXiv:2203.05482")
@dataclass(frozen=True)
class Soup(Aggregator):
    """Mean in which every model has one vote: of all, or of those that make it better on the server's examples.

    Wortsman et al. 2022. Uniform: ``theta+ = sum_i theta_i / K``. Greedy, recipe 1: from the best model on, in order of
    their scores, a model enters the mean if that scores better with it than without. The result is at least as good
    on these examples as the best client, and how many examples a client says it has plays no part in either.

    Parameters
    ----------
    recipe
        ``"uniform"``, or ``"greedy"``, which needs ``data`` with labels on the server and K to 2 K evaluations. The
        score is the accuracy, or minus the loss in tasks that have none. Aggregators see parameters only: batch norms
        are judged with the running statistics of the module at hand, so measure such models otherwise.
    accept
        Greedy: a model enters if the mean is then ``"better"``, as in the paper, or ``"as_good"``, as in DiWA
        (arXiv:2205.09739).

    Examples
    --------
    >>> import torch
    >>> sent = [ClientUpdate(i, {"w": torch.tensor([v])}, 1 + 9 * i) for i, v in enumerate((1.0, 3.0))]
    >>> Soup().merge(sent, MergeContext(), {})[0]["w"]
    tensor([2.])
    """

    recipe: Literal["uniform", "greedy"] = "uniform"
    accept: Literal["better", "as_good"] = "better"

    def __post_init__(self) -> None:
        check_word(self, "recipe", ("uniform", "greedy"))
        check_word(self, "accept", ("better", "as_good"))

    @property
    def separable(self) -> Separable:
        """Whether a model makes the mean better shows on whole models."""
        return "tensor" if self.recipe == "uniform" else "never"

    @property
    def server_data(self) -> ServerData:
        """Labels, where models are judged."""
        return "labels" if self.recipe == "greedy" else "none"

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Average; the memory stays empty."""
        if self.recipe == "greedy":
            return self._greedy(list(updates), context), {}
        total = WeightedSum()
        for update in updates:
            total.add(update.state, 1.0)
        return total.mean(), {}

    def _greedy(self, updates: list[ClientUpdate], context: MergeContext) -> dict[str, Tensor]:
        scores = [context.score(update.state, "soup") for update in updates]
        order = sorted(range(len(updates)), key=lambda i: (-scores[i], i))
        best, highest, members = _in_full(updates[order[0]].state), scores[order[0]], 1
        for i in order[1:]:
            state = updates[i].state
            tried = {name: (mean * members + state[name]) / (members + 1) for name, mean in best.items()}
            score = context.score(tried, "soup")
            if score > highest or (score == highest and self.accept == "as_good"):
                best, highest, members = tried, score, members + 1
        return best


def _in_full(state: State) -> dict[str, Tensor]:
    return {name: tensor.to(accumulator_dtype(tensor.dtype), copy=True) for name, tensor in state.items()}
