"""What a strategy of ours sends: the order of a round, to nodes that it draws, and the merged model to be judged."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from torch import Tensor, nn

from fedmerge.errors import ConfigError, InvalidOption
from fedmerge.merging import Pipeline
from fedmerge.merging.judged_model import going_on
from fedmerge.merging.tangent_check import check_linearised
from fedmerge.observers import Observer
from fedmerge.routing import RoutedModel
from fedmerge.seeding import generator
from fedmerge.state import State
from fedmerge.statistics.sending.settings import StatisticsSettings, to_settings
from fedmerge.strategies.flower_privacy import check_private
from fedmerge.strategies.heard import Sent
from fedmerge.strategies.identity import Identities
from fedmerge.strategies.keywords import check_server
from fedmerge.strategies.missed_replies import missed_by
from fedmerge.strategies.observed import UNWATCHED
from fedmerge.strategies.order import Order
from fedmerge.strategies.own_models import OwnModels
from fedmerge.strategies.participation import check_nodes, number_of_nodes, remedy
from fedmerge.strategies.policies import RoundPolicies
from fedmerge.strategies.travel import Travel
from fedmerge.update import MergeContext
from fedmerge.wire.flower_records import RULE_RECORD, WITHHOLD_KEY
from fedmerge.wire.keys import KEEP_KEY, LINEARISED_KEY, MISSED_KEY, ROUTING
from fedmerge.wire.record_values import to_arrays, view_arrays

__all__ = ["OrdersRounds", "fill_config", "sample_nodes", "wanted"]

log = logging.getLogger("fedmerge")

_TELL_EVERY = 30  # seconds
Entries = Mapping[str, str | float | bool | list[str]]


class OrdersRounds(FlowerFedAvg):
    """Flower's FedAvg with seeded draws, which sends each node no more than what it needs."""

    seed: int
    pipeline: Pipeline
    policies: RoundPolicies
    memory: dict[str, Tensor]
    identities: Identities
    travel: Travel
    observers: Sequence[Observer]
    last_evaluation: MetricRecord | None = None
    """What clients found on their held-out examples in the last round; None where nobody looked."""
    worst_accuracy: float | None = None
    """The mean accuracy among the tenth of these clients that has the lowest, or of the one, where they are few."""
    _own_models: OwnModels | None
    _data: Iterable[Any] | None
    _example: Any
    _watched: bool
    _wants_messages: bool
    _order: Order | None
    _base: State | None
    _grid: Grid | None
    _awaited: int | None
    _asked_to_judge: Sent | None
    _entries: tuple[Pipeline, Entries, Entries] | None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages of :meth:`order_train`.

        Raises
        ------
        InvalidOption
            As there; or the method sends what a wrapper for differential privacy does not cover.
        """
        wrapper = check_private(self.pipeline, arrays)
        if wrapper is not None:
            self.travel = self.travel.within(wrapper)
        return list(self.order_train(server_round, arrays, config, grid).messages())

    def order_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Order:
        """Send the model, and ask for what the method needs.

        Raises
        ------
        InvalidOption
            The method lacks something on the server, or more nodes are wanted than a simulated federation has.
        """
        if self.observers and not self._watched:
            raise InvalidOption(UNWATCHED)
        if self._order is None:
            check_server(self.pipeline, self.travel, self._data, self._example)
            if self.pipeline.linearises or self.travel.linearised:
                check_linearised(self.pipeline)
        goes_on = going_on(self.memory) if self.memory else {}
        if goes_on:  # `arrays` are an average that was judged, and clients train on from the model behind it
            arrays = to_arrays({**view_arrays(arrays), **goes_on})
        begins = self._order is None or server_round <= 1
        if begins or grid is not self._grid:
            self.travel.check(arrays)
            check_nodes(grid, vars(self))
        if server_round <= 1:  # of a new run, also under a wrapper, whose start is not ours
            self.identities = Identities()
            self.travel.begin()
        before = () if self._order is None else self._order.numbers
        self.travel.moved = self.pipeline.moved_weights(self.memory) if self.memory else {}
        self._base, self._grid, self.identities.grid = view_arrays(arrays), grid, grid
        config = ConfigRecord(dict(config))  # the caller's own is the next strategy's too
        if self._entries is None or self._entries[0] is not self.pipeline:
            self._entries = self.pipeline, *entries_of(self.pipeline)
        _fill(config, self.seed, server_round, self.pipeline, *self._entries[1:])
        if self.travel.still:
            config.update(self.travel.told(self._base))
        nodes: Sequence[int] = ()
        if self.fraction_train:
            nodes = self._sampled(grid, self.fraction_train, self.min_train_nodes, "sampling", server_round)
            self._awaited = server_round
        missed = missed_by(self.memory, nodes) if self.memory else []
        if missed:
            config[MISSED_KEY] = missed
        if nodes and self.pipeline.refinements and server_round == 1:  # later, clients that are gone end no run
            self.pipeline.privacy.check_clients(len(nodes))
        brief, whole = self._records(arrays, config)
        brought = {} if self.pipeline.local_rule is None else self.pipeline.sent_with_model(self.memory)
        if brought:
            brief[RULE_RECORD] = whole[RULE_RECORD] = to_arrays(brought)
        known = number_of_nodes(grid) if self.pipeline.aggregator.counts_clients else None
        self._order = Order(
            brief,
            nodes,
            self.pipeline,
            MergeContext(base=self._base, round=server_round, seed=self.seed, population=known, **self.travel.facts),
            self.travel.buffers,
            arrays_key=self.arrayrecord_key,
            weight_key=self.weighted_by_key,
            by_message=self._wants_messages,
            before=before,
            identities=self.identities,
            whole=whole,
            wanting=frozenset(node for node in nodes if self.travel.still and not self.travel.completes(node)),
        )
        return self._order

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the merged model to those who judge it on their held-out examples; to each its own, where it has one."""
        self.identities.grid, self._asked_to_judge, self.last_evaluation = grid, Sent(()), None
        self.worst_accuracy = None
        if self.fraction_evaluate == 0.0 or self.pipeline.privacy.withholds_metrics:
            return []
        config["server-round"] = server_round
        if self.pipeline.batch_norm == "local":
            config["batch-norm"] = "local"
        if self.pipeline.linearises:
            config[LINEARISED_KEY] = list(self.pipeline.linearises)
        share, least = self.fraction_evaluate, self.min_evaluate_nodes
        nodes = self._sampled(grid, share, least, "evaluation sampling", server_round)
        self.travel.moved = self.pipeline.moved_weights(self.memory) if self.memory else {}
        config.update(self.travel.told(view_arrays(arrays)))
        shared, own = self._records(arrays, config), self._own
        brought = None if own is None else own.brought
        if brought is not None:
            for record in shared:
                record[ROUTING] = brought
        messages: list[Message] = []
        for node in nodes:
            brief, whole = shared
            if own is not None and own.differ:
                brief, whole = self._records(own.judged_by(node, arrays), config)
            record = brief if self.travel.completes(node) else whole
            messages += self._construct_messages(record, [node], "evaluate")
        self._asked_to_judge = Sent(nodes, messages)
        return messages

    def served(self, model: nn.Module) -> nn.Module:
        """What the last round's model is to be used as: itself, or the routed model that the method makes of it."""
        own = self._own
        return model if own is None or own.routing is None else RoutedModel(model, own.routing)

    @property
    def _own(self) -> OwnModels | None:
        """What makes other models of the shared one; after an interruption, what the memory holds of it."""
        if self._own_models is None and self.memory:
            self._own_models = OwnModels().remembering(self.memory)
        return self._own_models

    def _sampled(self, grid: Grid, fraction: float, least: int, purpose: str, round: int) -> list[int]:
        return sample_nodes(
            grid, fraction, least, self.min_available_nodes, seed=self.seed, purpose=purpose, round=round
        )

    def _records(self, arrays: ArrayRecord, config: ConfigRecord) -> tuple[RecordDict, RecordDict]:
        """What a message brings with the tensors that travel, and with all."""
        config_key = self.configrecord_key
        whole = RecordDict({self.arrayrecord_key: arrays, config_key: config})
        if not self.travel.still:
            return whole, whole
        return RecordDict({self.arrayrecord_key: self.travel.down(arrays), config_key: config}), whole


def wanted(known: int, fraction: float, least: int, available: int) -> tuple[int, int]:
    """How many of the `known` nodes to ask, and how many there have to be before anybody is asked."""
    size = max(int(known * fraction), least)
    return size, max(available, size)


def sample_nodes(
    grid: Grid, fraction: float, at_least: int, min_available: int, *, seed: int, purpose: str, round: int
) -> list[int]:
    """Wait for enough nodes, then draw some of them without replacement, in order of their ids.

    Whoever waits is told so now and then.

    Raises
    ------
    InvalidOption
        There will never be enough.
    """
    waited = 0
    while True:
        known = grid.get_node_ids()
        # A range is in order already, and however many nodes it stands for, drawing from it costs what is drawn.
        nodes: Sequence[int] = known if isinstance(known, range) else sorted(known)
        size, enough = wanted(len(nodes), fraction, at_least, min_available)
        if len(nodes) >= enough:
            break
        most = getattr(grid, "most_nodes", None)
        if isinstance(most, int) and most < enough:
            raise InvalidOption(remedy(most, f"{enough} nodes"))
        if waited % _TELL_EVERY == 0:
            log.warning(
                "round %d waits for nodes: %d connected, %d wanted: start the others, or lower the strategy's "
                "min_available_nodes, min_train_nodes and min_evaluate_nodes", round, len(nodes), enough,
            )  # fmt: skip
        time.sleep(1)
        waited += 1
    if size == len(nodes):
        return list(nodes)
    drawn = generator(seed, purpose, round).choice(len(nodes), size=size, replace=False)
    return [nodes[i] for i in sorted(drawn)]


def entries_of(pipeline: Pipeline) -> tuple[Entries, Entries]:
    """What a pipeline has clients told in every round: settings of its local rule, and all else."""
    rule = pipeline.local_rule
    others: dict[str, str | float | bool | list[str]] = {}
    if pipeline.needs:
        others["needs"] = list(pipeline.needs)
        settings = [to_settings(kind) for kind in pipeline.measured]
        if any(text != "{}" for text in settings):
            others["needs-settings"] = settings
        usual = StatisticsSettings()
        if pipeline.sent_as.compression != usual.compression:
            others["statistics-compression"] = pipeline.sent_as.compression
        if pipeline.sent_as.budget != usual.budget:
            others["statistics-budget"] = pipeline.sent_as.budget
    if pipeline.batch_norm == "local":
        others["batch-norm"] = "local"
    if pipeline.linearises:
        others[LINEARISED_KEY] = list(pipeline.linearises)
    if pipeline.privacy.withholds_metrics:
        others[WITHHOLD_KEY] = True
    if pipeline.aggregator.several_exchanges or pipeline.compares:
        others[KEEP_KEY] = True
    return {} if rule is None else rule.told(), others


def fill_config(config: ConfigRecord, pipeline: Pipeline, seed: int, round: int) -> None:
    """Write into the configuration of a round's messages all that clients have to know.

    Raises
    ------
    ConfigError
        It says otherwise about the clients' training than the method does.
    """
    _fill(config, seed, round, pipeline, *entries_of(pipeline))


def _fill(config: ConfigRecord, seed: int, round: int, pipeline: Pipeline, rule: Entries, others: Entries) -> None:
    config.setdefault("seed", seed)  # the caller's own, if it set one, is the root of what clients draw
    for key, value in rule.items():
        given = {known: config[known] for known in (key, key.replace("-", "_")) if known in config}
        if any(told != value for told in given.values()):
            raise ConfigError(
                f"the training configuration has {given}, the method {type(pipeline.aggregator).__name__} sets "
                f"{key} = {value}: leave one of them out"
            )
    config.update({**rule, "server-round": round, **others})
