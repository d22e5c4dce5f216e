"""ZipIt: features of all clients zipped together by correlation, also within a client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmerge.aggregators.aligning import Aligning
from fedmerge.aggregators.fedavg import FedAvg
from fedmerge.lookup.option_checks import check_range
from fedmerge.matching.activation_costs import Heard, not_heard_singly, permutations_by
from fedmerge.matching.fairness import bounded, normalised, shares_of, typical
from fedmerge.matching.listening import Moments
from fedmerge.matching.symmetries import sampled_inputs, symmetries
from fedmerge.matching.zip import zip_clusters
from fedmerge.permutations import Plan, transport
from fedmerge.registry import register
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["ZipIt"]


@register("zipit", paper="arXiv:2305.03053")
@dataclass(frozen=True)
class ZipIt(Aligning):
    """Features of all clients clustered by correlation on the server's data; each cluster becomes one feature.

    Stoica et al. 2024. A merged feature is the mean of its cluster, weighed by examples; what took in one of the
    cluster takes in the mean. Features without correlation to another client's may be merged within a client.
    Heads of attention and groups of a norm, which a mixture of features would break, are re-ordered as a whole and
    within, to those of the first client that looks like most. Output layers are averaged as they are.

    Parameters
    ----------
    discount
        Factor on the similarity of what has been merged already, in (0, 1]; alpha in the paper. It applies where a
        cluster takes in a second feature of one client: for two clients as in the paper, for more only once a
        cluster has a feature of each.
    budget
        Part of a client's features that may be merged within it, in [0, 1]; beta in the paper.
    examples
        At most so many of the server's are listened to, evenly from all its batches; at least 1.
    """

    requires_data = True

    discount: float = 0.3
    budget: float = 0.125
    examples: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "examples", 1, float("inf"), open_high=True)
        check_range(self, "discount", 1e-12, 1.0)
        check_range(self, "budget", 0.0, 1.0)

    def align(self, updates: Sequence[ClientUpdate], context: MergeContext) -> Iterator[ClientUpdate]:
        """Carry each client's features to the clusters that they are in."""
        if len(updates) == 1:
            yield from updates
            return
        spec = symmetries(context, updates[0].state, "ZipIt")
        count = len(updates)
        modules = [context.module(u.state, "ZipIt") for u in updates]
        trained = bounded([context.trained(u.state, "ZipIt") for u in updates])
        pairs = [(i, j) for i in range(count) for j in range(i, count)]
        heard = Heard.of(spec, modules, pairs, sampled_inputs(context, "ZipIt", self.examples))
        heard.check([u.client for u in updates])
        first = min(typical(trained))
        turned = {(g, b, a): moments.turned() for (g, a, b), moments in heard.found.items()}
        both = Heard(heard.units, {**turned, **heard.found})
        found_by = [permutations_by(spec, both, (first, j), trained) for j in range(count)]
        blocks = [not_heard_singly(spec, perms, heard) for perms in found_by]
        # What is not averaged afterwards looks at the clients one by one, and knows no weights.
        parts = normalised if isinstance(self.combiner, FedAvg) else shares_of
        shares = torch.tensor(parts([u.weight for u in updates]), dtype=torch.float64)
        plans: list[dict[int, Plan]] = [{} for _ in updates]
        for unit, number in heard:
            if not unit.simple or (number, 0, 0) not in heard.found:
                continue
            matrix = _similarities(heard.found, number, count)
            owner = torch.arange(count).repeat_interleave(unit.size)
            clusters = zip_clusters(matrix, owner, unit.size, discount=self.discount, budget=self.budget)
            member = torch.zeros(unit.size, count * unit.size, dtype=torch.float64)
            member[clusters, torch.arange(len(clusters))] = 1
            weighted = member * shares[owner]
            weighted /= weighted.sum(1, keepdim=True)
            for j, (mean, takes) in enumerate(
                zip(torch.split(weighted, unit.size, 1), torch.split(member, unit.size, 1), strict=True)
            ):
                # The average over clients divides by their number of examples what is complete as a sum already.
                plans[j][unit.index] = Plan(mean / shares[j], takes)
        for update, perms, plan in zip(updates, blocks, plans, strict=True):
            yield replace(update, state=transport(spec, spec.apply(update.state, perms), plan))


def _similarities(heard: Mapping[tuple[int, int, int], Moments], number: int, count: int) -> Tensor:
    """[N, N] correlations of all clients' neurons; those that never change are as good as equal where they are."""
    rows = []
    for i in range(count):
        blocks = [
            heard[number, i, j].correlation() if i <= j else heard[number, j, i].correlation().T for j in range(count)
        ]
        rows.append(torch.cat(blocks, 1))
    matrix = torch.cat(rows).cpu()
    own = [heard[number, i, i] for i in range(count)]
    silent = torch.cat([moments.silent(0) for moments in own]).cpu()
    value = torch.cat([moments.mean(0) for moments in own]).cpu()
    equal = (value[:, None] - value).abs() <= 1e-5 * torch.maximum(value[:, None].abs(), value.abs())
    matrix[silent[:, None] & silent & equal] = 1.0
    return matrix
