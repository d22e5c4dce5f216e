"""What an aggregator is: a frozen dataclass whose fields are its hyper-parameters, with one pure method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Generic, Literal, TypeVar

from fedmerge.state import State
from fedmerge.statistics.statistic_type import Statistic
from fedmerge.training.rules.local_rule import LocalRule
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates

__all__ = ["Aggregator", "Fold", "Separable", "ServerData"]

ServerData = Literal["none", "inputs", "labels"]
"""What data a method needs on the server; with ``"labels"`` it judges whole models there."""
Separable = Literal["never", "layer", "tensor"]
"""On what a part of the result depends: ``tensor``, each tensor on that tensor of the clients alone, and on what they
measured of it; ``layer``, each layer on that layer; ``never``, on whole models."""

Total = TypeVar("Total")


class Aggregator(ABC):
    """Turns many client models into one.

    Subclasses are frozen dataclasses registered with :func:`fedmerge.registry.register`. They see
    parameters only, in client order, already checked: buffers, bad updates and dtypes are the pipeline's.
    """

    kind: ClassVar[str] = "aggregator"
    requires_base: ClassVar[bool] = False
    """Whether the merge is relative to the model that all clients started from."""
    requires_data: ClassVar[bool] = False
    """Whether the server needs data of its own."""
    may_change_depth: ClassVar[bool] = False
    """Whether models at hand may be of unequal depth: they are made equally deep before."""
    requires_model: ClassVar[bool] = False
    """Whether it has to know the model and an example of its inputs."""
    falls_back: ClassVar[bool] = False
    """Whether its refinements may start from the model of the client with most examples instead, or after the first
    round from the model that was sent, where that is better: models that cannot be aligned merge into less than any of
    them, and so do models whose training has diverged."""
    moves_base: ClassVar[bool] = False
    """Whether it adds to frozen parameters: factors of all that it has added stand in its memory then, see
    :mod:`fedmerge.adapters.folded_base`."""
    counts_clients: ClassVar[bool] = False
    """Whether it has to know how many clients the federation has, be they asked in a round or not."""
    may_change_width: ClassVar[bool] = False
    """Whether the merged model may be wider or narrower than the clients'."""
    allows_negative_weights: ClassVar[bool] = False
    """Whether models at hand may have negative weights, to be subtracted; clients of a federation never have."""

    @property
    def server_data(self) -> ServerData:
        """What the server must hold for these options."""
        return "inputs" if self.requires_data else "none"

    @property
    def several_exchanges(self) -> bool:
        """Whether clients are asked again within a merge, and so keep their model after training."""
        return False

    @property
    def separable(self) -> Separable:
        """What may be merged apart from the rest of a model, with other weights, see :data:`Separable`."""
        return "never"

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Statistics that clients must measure after training."""
        return ()

    @property
    def local_rule(self) -> LocalRule | None:
        """What the method changes in the clients' training, named in every train message; None for nothing."""
        return None

    def sent_with_model(self, memory: State) -> State:
        """Tensors of the local rule that go out beside the model, by the names of parameters; none while all are zero.

        Parameters
        ----------
        memory
            What this method returned as memory last round; empty in the first.
        """
        return {}

    @property
    def pair_patterns(self) -> tuple[str, ...]:
        """Patterns of low-rank pairs besides those with peft's names, see :func:`fedmerge.adapters.find_pairs`."""
        return ()

    @property
    def upload(self) -> float | None:
        """Most that a client may send in all exchanges of a round, its model included, in models; None for any."""
        return None

    @property
    def refined_by(self) -> str:
        """Refinements that belong to the method, as one would write them behind its name: ``"ridge_head"``."""
        return ""

    @abstractmethod
    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Merge `updates` into one state.

        Parameters
        ----------
        updates
            Client updates; may be a stream that can be read once. None of their tensors may be changed.
        context
            Base model, round and seed.
        memory
            What this method returned as memory last round; empty in the first.

        Returns
        -------
        tuple
            The merged parameters, in any floating dtype, and the memory for the next round.
        """


class Fold(Aggregator, Generic[Total]):
    """An aggregator that is a sum over clients: the server holds one model however many reply."""

    @abstractmethod
    def zero(self, context: MergeContext) -> Total:
        """The empty sum."""

    @abstractmethod
    def add(self, total: Total, update: ClientUpdate, context: MergeContext) -> Total:
        """`total` with one more client; may reuse the memory of `total`, never that of `update`."""

    @abstractmethod
    def join(self, total: Total, other: Total) -> Total:
        """The sum over the clients of both, so that workers can each fold their own; may reuse both memories."""

    @abstractmethod
    def finish(self, total: Total, context: MergeContext, memory: State) -> tuple[State, State]:
        """Merged parameters and memory from the complete sum."""

    def add_stacked(self, total: Total, updates: StackedUpdates, context: MergeContext) -> Total:
        """`total` with many more clients whose tensors are stacked; one by one where a method knows nothing better."""
        for update in updates:
            total = self.add(total, update, context)
        return total

    def merge(self, updates: Iterable[ClientUpdate], context: MergeContext, memory: State) -> tuple[State, State]:
        """Fold the stream of updates, one in memory at a time."""
        total = self.zero(context)
        for update in updates:
            total = self.add(total, update, context)
            del update  # before the stream makes the next one
        return self.finish(total, context, memory)
