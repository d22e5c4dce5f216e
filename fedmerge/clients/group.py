"""Who goes down the client road together, and with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import ArrayRecord, RecordDict
from torch import Tensor, nn

from fedmerge.clients.instructions import Instructions
from fedmerge.clients.own_parts import OwnParts
from fedmerge.data.client_data import ClientData
from fedmerge.state import State
from fedmerge.training.report import TrainingReport

__all__ = ["Group", "Received"]


@dataclass(frozen=True, eq=False)
class Received:
    """An order as clients read it.

    Parameters
    ----------
    told
        Its configuration.
    state
        The model sent; to be read only.
    brought
        All tensors that came, by the names of their records: the model's first, then whatever else the order brings,
        such as the control variate of a local rule.
    parts
        What of the model does not travel.
    """

    told: Instructions
    state: State
    brought: Mapping[str, ArrayRecord]
    parts: OwnParts


@dataclass(frozen=True, eq=False)
class Group:
    """Clients that go through the stages together: one, or many whose models are stacked.

    Parameters
    ----------
    order
        What they are told.
    clients
        Their numbers, ascending.
    data
        The examples of each.
    kept
        What each of them remembers; stages change it in place. Empty where nobody keeps anything.
    module
        The model that they train, from :func:`add_own` on. It is on loan: the next client trains in the same one.
    start
        Parameters that it starts from, where somebody asks for them after training.
    states
        From :func:`train` on, tensors [K, ...] under ``state_dict`` names, a row for each client.
    reports
        What training did.
    ruled
        What each client is to keep for the method's local rule, from :func:`train` on; empty where there is nothing.
    returned
        Tensors that the training of each client gives besides its model, by name: what local rules send back.
    statistics, errors
        From :func:`measure` on, what each client sends besides its model, and the error of compression where there can
        be one.
    """

    order: Received
    clients: tuple[int, ...]
    data: tuple[ClientData, ...]
    kept: tuple[RecordDict, ...] = ()
    module: nn.Module | None = None
    start: State | None = None
    states: State | None = None
    reports: tuple[TrainingReport, ...] = ()
    ruled: tuple[State, ...] = ()
    returned: tuple[Mapping[str, State], ...] = ()
    statistics: tuple[Mapping[str, State], ...] = ()
    errors: tuple[float | None, ...] = ()

    def __len__(self) -> int:
        return len(self.clients)

    def rows(self, start: int, end: int) -> Group:
        """Some of the clients; tensors are views."""
        if (start, end) == (0, len(self)):
            return self
        rows = slice(start, end)
        return replace(
            self,
            clients=self.clients[rows],
            data=self.data[rows],
            kept=self.kept[rows],
            states=None if self.states is None else {name: stacked[rows] for name, stacked in self.states.items()},
            reports=self.reports[rows],
            ruled=self.ruled[rows],
            returned=self.returned[rows],
            statistics=self.statistics[rows],
            errors=self.errors[rows],
        )

    def state(self, row: int = 0) -> dict[str, Tensor]:
        """One client's tensors after training; views."""
        return {name: stacked[row] for name, stacked in (self.states or {}).items()}

    @staticmethod
    def joined(groups: Sequence[Group]) -> Group:
        """Groups that have only entered as one."""
        return Group(
            groups[0].order,
            tuple(client for one in groups for client in one.clients),
            tuple(data for one in groups for data in one.data),
            tuple(kept for one in groups for kept in one.kept),
        )
