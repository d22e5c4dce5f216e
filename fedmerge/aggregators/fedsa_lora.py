"""FedSA-LoRA: A is averaged, B stays with the clients."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedmerge.adapters.low_rank_pairs import check_pair_patterns, factor_names, factor_side
from fedmerge.aggregators.fedavg import FedAvg
from fedmerge.errors import AdapterError
from fedmerge.registry import register
from fedmerge.state import WeightedSum
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates

__all__ = ["FedSaLora"]


@register("fedsa_lora", paper="arXiv:2410.01463")
@dataclass(frozen=True)
class FedSaLora(FedAvg):
    """Average of the factors A, which are shared; the factors B are the clients' own and never sent.

    Guo et al. 2024: A learns what is general, B what is a client's. Run it with ``personal = ["*lora_B*",
    "*lora_embedding_B*"]`` (or the patterns of your own names), so that clients keep B and are judged with their own.
    Other parameters are averaged.

    Parameters
    ----------
    pairs
        One's own names of pairs, see :func:`~fedmerge.adapters.find_pairs`.

    Examples
    --------
    >>> import torch
    >>> sent = [ClientUpdate(i, {"lora_A.weight": torch.full((1, 2), float(i))}, 1 + i) for i in range(2)]
    >>> FedSaLora().merge(sent, MergeContext(), {})[0]["lora_A.weight"].round(decimals=4)
    tensor([[0.6667, 0.6667]])
    """

    separable = "never"  # type: ignore[assignment]
    pairs: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        check_pair_patterns(self.pairs)

    def add(self, total: WeightedSum, update: ClientUpdate, context: MergeContext) -> WeightedSum:
        """Add one client.

        Raises
        ------
        AdapterError
            It sends a B, or no A.
        """
        self._check(tuple(update.state))
        return super().add(total, update, context)

    def add_stacked(self, total: WeightedSum, updates: StackedUpdates, context: MergeContext) -> WeightedSum:
        """Add many clients."""
        self._check(tuple(updates.states))
        return super().add_stacked(total, updates, context)

    def _check(self, names: tuple[str, ...]) -> None:
        own = [name for name in names if factor_side(name) == "B"]
        own += [pattern for pattern in self.pairs if factor_names(names, "B", [pattern])]
        if own:
            raise AdapterError(
                f"fedsa_lora: {own[0]!r} is a factor B, which stays with its client: set personal = "
                '["*lora_B*", "*lora_embedding_B*"], or your own names'
            )
        if not any(factor_side(name) == "A" for name in names) and not factor_names(names, "A", self.pairs):
            raise AdapterError("fedsa_lora shares the factors A of low-rank pairs, and clients send none")
