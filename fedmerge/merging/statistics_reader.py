"""What clients measured, read for a merge: only what all agree on, and only from clients whose numbers can be true."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from fedmerge.checks.validation import weight_of
from fedmerge.errors import BadUpdate
from fedmerge.merging.agreement import UNREADABLE, Agreement, Vote, agree
from fedmerge.state import State
from fedmerge.statistics import Statistic
from fedmerge.statistics.measuring.measurable import Measurable
from fedmerge.statistics.sending.compression import decode
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["StatisticsReader"]


class StatisticsReader:
    """Reads the statistics that a method needs.

    Parameters
    ----------
    needs
        Those statistics, as clients are asked for them.
    agreements
        What clients agree on, by statistic, where all have been heard before; else each is judged by itself.
    """

    def __init__(self, needs: Sequence[Statistic], agreements: Mapping[str, Agreement] | None = None) -> None:
        self._needs, self._agreements = needs, agreements or {}

    @classmethod
    def hearing(
        cls,
        needs: Sequence[Statistic],
        updates: Iterable[ClientUpdate | BadUpdate],
        reference: State,
        context: MergeContext,
    ) -> StatisticsReader:
        """A reader that has gone through all `updates` once, for names and shapes alone."""
        votes: dict[str, list[Vote]] = {kind.name: [] for kind in needs}
        for update in updates if needs else ():
            if isinstance(update, BadUpdate):
                continue
            try:
                weight = weight_of(update.client, update.weight)
            except BadUpdate:  # who will be left out has no vote
                continue
            for kind in needs:
                sent = update.statistics.get(kind.name)
                vote = None if sent is None else Vote.of(kind, update.client, weight, sent, reference)
                if vote is not None:
                    votes[kind.name].append(vote)
        model = None
        if context.model_fn is not None and any(type(kind).doubt is not Statistic.doubt for kind in needs):
            model = Measurable.of(context.model_fn())
        return cls(needs, {kind.name: agree(kind, votes[kind.name], reference, model) for kind in needs})

    def read(self, update: ClientUpdate) -> dict[str, State]:
        """An update's statistics as methods use them.

        Raises
        ------
        MissingStatistic
            One is not there that the method cannot do without.
        BadUpdate
            One cannot be what measuring the client's model gives.
        """
        needed = (kind for kind in self._needs if not kind.optional or kind.name in update.statistics)
        return {kind.name: self._one(kind, update) for kind in needed}

    def _one(self, kind: Statistic, update: ClientUpdate) -> State:
        sent, agreement = update.statistic(kind.name), self._agreements.get(kind.name)

        def check(shapes: Mapping[str, tuple[int, ...]]) -> None:
            kind.check_shapes(shapes, update.state)
            if agreement is not None:
                agreement.check(kind, update.client, shapes, update.state)

        try:
            parsed = kind.parse(decode(sent, check))
            value = kind.received(parsed if agreement is None else agreement.kept(kind, parsed), update.state)
            return {name: _beside(update.state, tensor) for name, tensor in value.items()}
        except UNREADABLE as error:
            raise BadUpdate(update.client, str(error), "Mend what the client measures.") from error


def _beside(state: State, tensor: Tensor) -> Tensor:
    """A tensor on the device of the client's model."""
    first = next(iter(state.values()), tensor)
    return tensor.to(first.device)
