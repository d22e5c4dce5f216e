"""What clients measured, read for a merge: only what all agree on, and only from clients whose numbers can be true.

What they agree on goes by names and shapes, which are read before any number is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod
from statistics import median_low
from typing import Any

from torch import Tensor

from fedmerge.checks.raw_errors import RAW
from fedmerge.checks.validation import weight_of
from fedmerge.errors import BadStatistic, BadUpdate, InvalidOption, shown
from fedmerge.state import State
from fedmerge.statistics.measuring.measurable import Measurable
from fedmerge.statistics.sending.compression import decode, mean_diagonals, shapes_of
from fedmerge.statistics.statistic_type import Shapes, Statistic
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["UNREADABLE", "Agreement", "StatisticsReader", "Vote", "agree", "most_complete"]

UNREADABLE = (InvalidOption, *RAW)
"""What reading a client's tensors may raise: those that torch cannot even compare are as bad as the rest."""

_LARGE = 1e4
"""How many times as large as usual second moments of inputs may be: honest inputs are of one kind."""

Form = frozenset[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Agreement:
    """What of one statistic every client of a round has to have sent.

    Parameters
    ----------
    parts
        Shapes by name, of what :meth:`~fedmerge.statistics.statistic_type.Statistic.voted` says.
    model
        The model's own word, where some client follows it: then all have to.
    outlying
        Clients whose numbers cannot go with those of the others, each with the reason.
    """

    parts: Shapes
    model: Measurable | None = None
    outlying: Mapping[int, str] = field(default_factory=dict)

    def check(self, statistic: Statistic, client: int, shapes: Shapes, state: State) -> None:
        """Make sure that a client sent what is agreed; more does no harm.

        Raises
        ------
        InvalidOption
            Something is missing, of another shape or not of the model, or the client is outlying.
        """
        doubt = None if self.model is None else statistic.doubt(shapes, state, self.model)
        if doubt is not None:
            raise InvalidOption(f"statistic {statistic.name!r}: {doubt}")
        own = statistic.voted(shapes)
        for name, shape in self.parts.items():
            if name not in own:
                raise InvalidOption(f"statistic {statistic.name!r}: {name!r} is missing, which most clients have")
            if own[name] != shape:
                raise InvalidOption(
                    f"statistic {statistic.name!r}: {name!r} has shape {list(own[name])}, that of most clients has "
                    f"{list(shape)}"
                )
        if client in self.outlying:
            raise InvalidOption(self.outlying[client])

    def kept(self, statistic: Statistic, value: State) -> State:
        """A value without what only few clients have: no merge could use it."""
        few = set(statistic.voted({name: tuple(tensor.shape) for name, tensor in value.items()})) - set(self.parts)
        return {name: tensor for name, tensor in value.items() if name not in few} if few else value


@dataclass(frozen=True)
class Vote:
    """Names and shapes of one client's value, mean diagonals of what it tells of inputs, and all of a few numbers."""

    client: int
    weight: float
    shapes: Shapes
    inputs: Mapping[str, float]
    value: State | None

    @classmethod
    def of(cls, statistic: Statistic, client: int, weight: Any, sent: Any, state: State) -> Vote | None:
        """Read one, as it travelled; None where it is none: the client is told why when its update is read."""
        try:
            weight = float(weight)
            if not isfinite(weight):
                return None
            shapes = shapes_of(sent)
            statistic.check_shapes(shapes, state)
            value = statistic.received(statistic.parse(decode(sent)), state) if statistic.among_metrics else None
            inputs = mean_diagonals(sent, {name for name in shapes if statistic.of_inputs(name)})
        except UNREADABLE:
            return None
        return cls(client, weight, shapes, inputs, value)


def agree(statistic: Statistic, votes: Sequence[Vote], state: State, model: Measurable | None) -> Agreement:
    """Hear all clients of a round on what one statistic consists of.

    Each has one vote, however many examples it says to have. Where the server knows the `model`, and any client sent
    what the model has, that is what all must send, be the others many. Apart from that, what counts is the most
    complete form that at least half of the clients have, see :func:`most_complete`.

    Parameters
    ----------
    statistic, votes
        Which, and what clients sent of it.
    state
        A state with the shapes of the clients'.
    model
        What the server's model offers to be measured, where it knows the model.
    """
    if model is not None:
        true = [vote for vote in votes if statistic.doubt(vote.shapes, state, model) is None]
        votes, model = (true, model) if true else (votes, None)
    parts = most_complete([statistic.voted(vote.shapes) for vote in votes])
    agreeing = [vote for vote in votes if all(statistic.voted(vote.shapes).get(n) == s for n, s in parts.items())]
    few = {vote.client: (vote.value, vote.weight) for vote in agreeing if vote.value is not None}
    return Agreement(parts, model, {**_large(statistic, agreeing), **statistic.outlying(few)})


def _large(statistic: Statistic, votes: Sequence[Vote]) -> dict[int, str]:
    """Clients into whose layers goes what is a hundred times as large as usual, which would take all the say.

    The usual is the median client's; of two clients nobody can say which is.
    """
    found: dict[int, str] = {}
    for name in {name for vote in votes for name in vote.inputs} if len(votes) > 2 else ():
        told = {vote.client: vote.inputs[name] for vote in votes if name in vote.inputs}
        sizes = {client: size for client, size in told.items() if isfinite(size)}  # others are refused for that
        usual = median_low(sizes.values()) if sizes else 0.0
        for client, size in sizes.items():
            if usual > 0 and size > _LARGE * usual:
                found[client] = (
                    f"statistic {statistic.name!r}: {name!r} has a mean diagonal of {size:.3g}, that of most clients "
                    f"{usual:.3g}"
                )
    return found


def most_complete(forms: Collection[Shapes]) -> Shapes:
    """The largest of these names with shapes that at least half of them include.

    Whoever sends less cannot take a layer from all, and whoever sends more does not make the others incomplete.
    Where there is none, as where each lacks something else, it is what all have.

    Examples
    --------
    >>> full, part = {"a": (2, 2), "b": (3, 3)}, {"a": (2, 2)}
    >>> most_complete([{}, part, full, full, full]) == full, most_complete([full, part, part]) == part
    (True, True)
    """
    counted = Counter(frozenset(form.items()) for form in forms)
    if len(counted) <= 1:  # nobody measured anything else
        return dict(next(iter(counted), ()))
    candidates = sorted(counted, key=_completeness, reverse=True)
    for form in candidates:
        if 2 * sum(times for other, times in counted.items() if form <= other) >= len(forms):
            return dict(form)
    return dict(frozenset.intersection(*counted))


def _completeness(form: Form) -> tuple[int, int, str]:
    return len(form), sum(prod(shape) for _, shape in form), shown(sorted(form))


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
            raise BadStatistic(update.client, str(error), "Mend what the client measures.") from error


def _beside(state: State, tensor: Tensor) -> Tensor:
    """A tensor on the device of the client's model."""
    first = next(iter(state.values()), tensor)
    return tensor.to(first.device)
