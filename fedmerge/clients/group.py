"""An order as clients read it, and who goes down the client road together, with what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor, nn

from fedmerge.clients.own_parts import OwnParts
from fedmerge.clients.told_training import ELSEWHERE, told_training
from fedmerge.data.client_data import ClientData
from fedmerge.state import State
from fedmerge.training.local_training import LocalTraining
from fedmerge.training.report import TrainingReport
from fedmerge.training.rules.local_rule import RULE, LocalRule, rule_of
from fedmerge.wire.flower_records import WITHHOLD_KEY
from fedmerge.wire.keys import KEEP_KEY
from fedmerge.wire.record_values import integer, strings

__all__ = ["Group", "Instructions", "Received"]

_STAGES = 1 << 20  # more than there are rounds


@dataclass(frozen=True, eq=False)
class Instructions:
    """The configuration of an order to train, read once.

    Parameters
    ----------
    config
        As it came; what clients measure is read from it where they measure.
    training
        How to train in this round.
    rule
        What the method changes in training, if anything.
    seed, round
        Name the random streams of batches, with the client's number. Stages of one round draw apart.
    server_round, stage
        Where in the run this order is: the stage is 0 for the first exchange of a round.
    frozen
        Names of parameters that are not trained this time.
    wanted
        Names of the tensors that a later stage sends back; the first sends all.
    """

    config: ConfigRecord
    training: LocalTraining
    rule: LocalRule | None
    seed: int
    round: int
    server_round: int
    stage: int
    frozen: tuple[str, ...]
    wanted: tuple[str, ...]

    @classmethod
    def read(cls, config: ConfigRecord, training: LocalTraining, *, alone: bool = True) -> Instructions:
        """Read the configuration of a message or of a cohort's order.

        Parameters
        ----------
        config
            What came.
        training
            How to train where it says nothing.
        alone
            Whether nobody else reads it, see :func:`told_training`.

        Raises
        ------
        UnknownName, ConfigError, InvalidOption
            It cannot be read.
        """
        server_round, stage = integer(config, "server-round"), integer(config, "stage")
        if any(key.replace("-", "_") not in ELSEWHERE for key in config):
            training = told_training(training, config, alone=alone)
        if training.schedule != "constant":
            training = training.in_round(server_round)
        rule = rule_of(config) if RULE in config else None
        if rule is not None:
            rule.check(training)
        return cls(
            config=config,
            training=training,
            rule=rule,
            seed=integer(config, "seed"),
            round=server_round + stage * _STAGES,
            server_round=server_round,
            stage=stage,
            frozen=tuple(strings(config, "frozen")),
            wanted=tuple(strings(config, "send")),
        )

    def held(self, names: Iterable[str]) -> frozenset[str]:
        """Which parameters of these names the method's local rule holds still in this round."""
        return frozenset() if self.rule is None else frozenset(self.rule.held(tuple(names), self.server_round))

    @cached_property
    def keeps_buffers(self) -> bool:
        """Whether batch norms stay with the client."""
        return self.config.get("batch-norm") == "local"

    @cached_property
    def keeps_model(self) -> bool:
        """Whether the client keeps its model until the next order."""
        return bool(self.config.get(KEEP_KEY))

    @cached_property
    def withholds(self) -> bool:
        """Whether the client keeps its training loss to itself."""
        return bool(self.config.get(WITHHOLD_KEY))

    @cached_property
    def measures(self) -> bool:
        """Whether the client is asked for statistics."""
        return bool(strings(self.config, "needs"))


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
        What of the model does not travel; None where all of it does.
    """

    told: Instructions
    state: State
    brought: Mapping[str, ArrayRecord]
    parts: OwnParts | None

    def completed(self, state: State, kept: RecordDict | None = None) -> State:
        """A model as it was sent, with what does not travel."""
        return state if self.parts is None else self.parts.received(state, kept)

    def travelling(self, state: State) -> State:
        """The part of a trained model, or of many stacked, that goes to the server."""
        return state if self.parts is None else self.parts.sent(state)


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
    own
        Of several that train stacked, the tensors of each that are its own, in place of the module's; from
        :func:`add_own` on.
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
    own: tuple[State, ...] = ()
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
            own=self.own[rows],
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
