"""The policies of a run for strategies that do not know them, applied to what comes back from the clients."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message

from fedmerge.errors import ClientFailed, NoUsableUpdates
from fedmerge.simulation.grids.exchanges import Failure, MeasuredGrid
from fedmerge.simulation.grids.wrapped_grid import WrappedGrid
from fedmerge.strategies.failures import failed_client, quoted, tell
from fedmerge.strategies.order import Answer, Order
from fedmerge.strategies.policies import RoundPolicies

__all__ = ["PolicedGrid", "client_of"]


class PolicedGrid(WrappedGrid):
    """Looks at replies before the strategy does: too few end the run, or are kept from it, as the policies say.

    Parameters
    ----------
    grid
        Keeps account of exchanges.
    method
        What runs, for messages.
    policies, least
        What becomes of a round in which clients fail, and the fewest replies that a strategy is given.
    ours
        Whether the strategy is one of ours, which knows all this, and only wants to hear that everybody has failed.
    """

    def __init__(
        self, grid: MeasuredGrid, method: str, policies: RoundPolicies, least: int, *, ours: bool, round: int
    ) -> None:
        super().__init__(grid)
        self._measured, self._method, self._policies = grid, method, policies
        self._least, self._ours = least, ours
        self.round = round
        """The round under way."""
        self.skipped: str | None = None
        """Why replies of this round were kept from the strategy, if they were."""

    def next_round(self) -> None:
        """A round is over."""
        self.round, self.skipped = self.round + 1, None

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send, wait, and look at who has failed.

        Raises
        ------
        NoUsableUpdates
            Too few clients replied to train, under ``on_too_few="raise"``.
        ClientFailed
            One failed, under ``on_client_error="raise"``.
        """
        before = len(self._measured.exchanges)
        replies = self._grid.send_and_receive(messages, timeout=timeout)
        kinds = {exchange.kind for exchange in self._measured.exchanges[before:]}
        if "evaluate" in kinds and not self._ours:
            tell(self._failed(("evaluate",)), "evaluation")
        if "train" in kinds and self._too_few():
            return [message for message in replies if message.has_error()]
        return replies

    def train(self, order: Order, *, timeout: float | None = None) -> Answer:
        """Hand an order of a strategy of ours on, and look at who has failed; raises as :meth:`send_and_receive`."""
        answer = self._measured.train(order, timeout=timeout)
        if order.nodes:
            self._too_few()
        return answer

    def _failed(self, kinds: tuple[str, ...]) -> list[ClientFailed]:
        exchanges = (exchange for exchange in self._measured.exchanges if exchange.kind in kinds)
        return [client_of(failure, self.round) for exchange in exchanges for failure in exchange.failures]

    def _too_few(self) -> bool:
        """Whether too few have replied for the strategy to hear of it."""
        ok = sum(exchange.ok for exchange in self._measured.exchanges if exchange.kind == "train")
        raising = self._policies.on_too_few == "raise"
        if self._ours and (ok or not raising):
            return False
        failed = self._failed(("train",))
        tell(failed)  # Flower's log is not shown here
        self._policies.check(((one.client, one.reason) for one in failed), self.round)
        if not ok and raising:
            reason = f"client {failed[0].client}: {failed[0].reason}" if failed else "none replied"
            raise NoUsableUpdates(
                f"{self._method}: all clients failed in round {self.round}; the first: {reason}", failed=failed
            )
        if ok >= self._least:
            return False
        told = f" ({quoted(failed)})" if failed else ""
        self.skipped = f"{ok} clients replied, at least {self._least} wanted{told}"
        if raising:
            raise NoUsableUpdates(f"{self._method}: round {self.round}: {self.skipped}", failed=failed)
        return True


def client_of(failure: Failure, round: int) -> ClientFailed:
    """Who failed, under the client's number, which its node tells here."""
    name = f"on node {failure.node}" if failure.client is None else failure.client
    return failed_client(failure.node, failure.reason, round, lambda node, claimed: (name, claimed == name))
