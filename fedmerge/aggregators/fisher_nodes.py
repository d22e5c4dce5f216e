"""Fisher-nodes merging: averaging neuron by neuron, weighted by how much each client's loss depends on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.aggregators.aggregator import Aggregator, Separable
from fedmerge.curvature.collected import Collected
from fedmerge.registry import register
from fedmerge.state import State
from fedmerge.statistics import FisherKfac, Statistic
from fedmerge.statistics.measuring.weight_matrices import WeightMatrix
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["FisherNodes"]


@register("fisher_nodes", paper="arXiv:2403.09891")
@dataclass(frozen=True)
class FisherNodes(Aggregator):
    """Average of neurons, each weighted by the client's Fisher information of a mask on it.

    Thennal et al. 2024: row j of a layer, a neuron's weights and bias, is ``theta_j = sum_i p_i s_ij theta_ij / sum_i
    p_i s_ij``, where ``s_ij = E (d loss / d m_j)^2`` for a mask ``m_j = 1`` that multiplies the neuron's output before
    its activation. That derivative is ``g_j (w_j a)``, a the layer's inputs, 1 included where there is a bias. With
    Kronecker factors ``A = E a a^T`` and ``G = E g g^T``, which take a and g to be independent, it is ``s_j = G_jj
    w_j^T A w_j``. The authors measure masks of heads and of hidden neurons of transformers directly; here the rows of
    all linear layers and convolutions are nodes. Equal scores give FedAvg, and a row that no client has information
    of is averaged.

    Parameters
    ----------
    universal
        Weigh what is in no row, such as norms and embeddings, by a client's mean score over all of its nodes, as the
        authors do by default; else it is averaged.
    """

    universal: bool = True

    @property
    def separable(self) -> Separable:
        """Scores over all of a client's nodes are a look at the whole model."""
        return "never" if self.universal else "layer"

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Kronecker factors."""
        return (FisherKfac(),)

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Weigh every row; the memory stays empty."""
        clients = Collected.of(updates)
        measured = clients.measured("fisher_kfac")
        weights = [n.removesuffix(".A") for n in measured if n.endswith(".A") and f"{n[:-2]}.G" in measured]
        merged, sums, nodes = dict(clients.mean), [0.0] * len(clients.weights), 0
        for weight in weights:
            inputs, outputs = measured[f"{weight}.A"], measured[f"{weight}.G"]
            matrix = WeightMatrix.measured_by(weight, inputs[0], clients.states[0])
            pairs = zip(clients.states, inputs, outputs, strict=True)
            scores = torch.stack([node_scores(matrix.gather(state), a, g) for state, a, g in pairs])
            mean = matrix.gather(clients.mean).double()
            total = torch.tensordot(torch.tensor(clients.weights, dtype=torch.float64).to(scores), scores, 1)
            kept = total <= 0
            mean = torch.where(kept[..., None], mean, 0.0)
            for state, share, score in zip(clients.states, clients.weights, scores, strict=True):
                part = torch.where(kept, 0.0, share * score / torch.where(kept, 1.0, total))
                mean += part[..., None] * matrix.gather(state)
            merged.update(matrix.scatter(mean))
            sums = [known + float(score.sum()) for known, score in zip(sums, scores, strict=True)]
            nodes += scores[0].numel()
        if self.universal and nodes:
            held = {name for weight in weights for name in _names(clients, measured, weight)}
            merged.update(_weighed(clients, [known / nodes for known in sums], set(merged) - held))
        return merged, {}


def node_scores(matrix: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """``G_jj w_j^T A w_j`` of rows w_j, [groups, rows], in float64; factors [d, d] and [rows, rows], or of each group.

    Examples
    --------
    >>> node_scores(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), torch.eye(2), torch.eye(2))
    tensor([[5., 1.]], dtype=torch.float64)
    """
    rows, groups = matrix.double(), len(matrix)
    inputs = inputs.double().reshape(groups, rows.shape[2], rows.shape[2])
    outputs = outputs.double().reshape(groups, rows.shape[1], rows.shape[1])
    return ((rows @ inputs) * rows).sum(2).clamp(min=0) * outputs.diagonal(dim1=1, dim2=2).clamp(min=0)


def _names(clients: Collected, measured: dict[str, list[Tensor]], weight: str) -> tuple[str, ...]:
    return WeightMatrix.measured_by(weight, measured[f"{weight}.A"][0], clients.states[0]).names


def _weighed(clients: Collected, scores: list[float], names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors weighted by the clients' scores, or left out where nobody has any."""
    factors = [share * score for share, score in zip(clients.weights, scores, strict=True)]
    total = sum(factors)
    if total <= 0:
        return {}
    return {
        name: sum(
            (
                factor / total * state[name].to(clients.mean[name])
                for factor, state in zip(factors, clients.states, strict=True)
            ),
            torch.zeros_like(clients.mean[name]),
        )
        for name in sorted(names)
    }
