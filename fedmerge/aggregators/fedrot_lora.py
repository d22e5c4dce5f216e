"""FedRot-LoRA: the clients' factors are turned towards one reference, then averaged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.adapters.low_rank_pairs import Pair
from fedmerge.adapters.small_cores import Term
from fedmerge.aggregators.pair_rule import PairRule
from fedmerge.aggregators.pair_updates import PairUpdates
from fedmerge.registry import register

__all__ = ["FedRotLora", "turn_towards"]


@register("fedrot_lora", paper="arXiv:2602.23638")
@dataclass(frozen=True)
class FedRotLora(PairRule):
    """Average of the factors, each client's being turned first so that they lie near the pair that was sent.

    After arXiv:2602.23638: ``B_i A_i = (B_i R_i^T) (R_i A_i)`` for any orthogonal R_i, so clients drift apart in turns
    that mean nothing. R_i minimises ``||R A_i - A||^2 + ||B_i R^T - B||^2`` against the pair A, B that was sent
    (orthogonal Procrustes, Schoenemann 1966); without one, against that of the client of most weight. Then
    ``A = sum_i p_i R_i A_i`` and ``B = sum_i p_i B_i R_i^T``. The cross terms of ``fedit`` are not gone, but smaller,
    and no client's turn has any influence. Its equations were taken from the idea of the paper, not from its text.

    Examples
    --------
    >>> from fedmerge.update import ClientUpdate, MergeContext
    >>> a, turn = torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> sent = [ClientUpdate(0, {"lora_A.weight": a, "lora_B.weight": 2 * a}, 2)]
    >>> sent += [ClientUpdate(1, {"lora_A.weight": turn @ a, "lora_B.weight": 2 * a @ turn.T})]
    >>> merged, _ = FedRotLora().merge(sent, MergeContext(), {})
    >>> bool((merged["lora_B.weight"] @ merged["lora_A.weight"] - 2 * a).abs().max() < 1e-6)
    True
    """

    def merged_pair(self, pair: Pair, given: PairUpdates) -> tuple[Tensor, Tensor]:
        """The two means of turned factors."""
        terms = given.terms(pair)
        reference = given.start(pair) or max(terms, key=lambda term: term.weight)
        b, a = torch.zeros_like(terms[0].b), torch.zeros_like(terms[0].a)
        for term in terms:
            turn = turn_towards(term, reference)
            b.add_(term.b @ turn.T * term.weight)
            a.add_(turn @ term.a * term.weight)
        return b, a


def turn_towards(term: Term, reference: Term) -> Tensor:
    """The orthogonal R [r, r] for which ``R A`` and ``B R^T`` are nearest to a reference of the same rank.

    Examples
    --------
    >>> turned, sent = Term(torch.eye(2)[[1, 0]].T, torch.eye(2)[[1, 0]]), Term(torch.eye(2), torch.eye(2))
    >>> turn_towards(turned, sent)
    tensor([[0., 1.],
            [1., 0.]])
    """
    agreement = reference.a.double() @ term.a.double().T + reference.b.double().T @ term.b.double()
    left, _, right = torch.linalg.svd(agreement)
    turn: Tensor = (left @ right).to(term.b)
    return turn
