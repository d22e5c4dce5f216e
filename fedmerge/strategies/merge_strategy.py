"""Any aggregator as a Flower strategy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from fedmerge.errors import BadUpdate, ClientFailed, InvalidOption, NoUsableUpdates
from fedmerge.layout import BatchNormPolicy, FrozenMode, check_patterns
from fedmerge.lookup.keyword_check import check_function
from fedmerge.merging import Pipeline, build_pipeline, main_part
from fedmerge.merging.judged_model import going_on
from fedmerge.observers import ObserverLike, make_observers
from fedmerge.questions import Trust
from fedmerge.questions.stages import News, Stage
from fedmerge.refine import Privacy
from fedmerge.refine.budget import Billed
from fedmerge.state import State
from fedmerge.statistics import StatisticsSettings
from fedmerge.strategies.client_metrics import alike
from fedmerge.strategies.evaluation import EvaluatedByClients
from fedmerge.strategies.failures import check_mods, failed_client
from fedmerge.strategies.flower_privacy import check_private
from fedmerge.strategies.heard import Sent
from fedmerge.strategies.identity import Identities
from fedmerge.strategies.keywords import check_keywords, check_server, statistics_settings
from fedmerge.strategies.merge_report import MergeReport
from fedmerge.strategies.missed_replies import keeping_missed, missed_by, noted
from fedmerge.strategies.observed import UNWATCHED, start_observed
from fedmerge.strategies.order import Answer, Order, fill_config
from fedmerge.strategies.own_models import OwnModels
from fedmerge.strategies.participation import check_nodes, check_participation, number_of_nodes
from fedmerge.strategies.policies import RoundFailures, RoundPolicies
from fedmerge.strategies.question_messages import ask
from fedmerge.strategies.reach import Reach
from fedmerge.strategies.recalibration import recalibrate
from fedmerge.strategies.resume import StrategyCheckpoints
from fedmerge.strategies.rounds import read_replies, run_rounds
from fedmerge.strategies.run_outcome import WITHHELD, RunOutcome, check_start, too_few
from fedmerge.strategies.run_settings import RunSettings
from fedmerge.strategies.stage_messages import exchange
from fedmerge.strategies.travel import SendFrozen, Travel
from fedmerge.update import ClientUpdate, MergeContext
from fedmerge.wire.flower_records import RULE_RECORD, WITHHOLD_KEY, to_arrays, view_arrays
from fedmerge.wire.keys import KEEP_KEY, MISSED_KEY

__all__ = ["MergeReport", "MergeStrategy"]

log = logging.getLogger("fedmerge")

MetricsAggregation = Callable[[list[RecordDict], str], MetricRecord]


class MergeStrategy(EvaluatedByClients):
    """A Flower strategy that merges with any method of :func:`fedmerge.methods`.

    It speaks Flower's message API and takes replies of a stock ClientApp (one ArrayRecord, ``num-examples``);
    methods that need statistics ask for them in the ConfigRecord and find them as further records of the
    reply, as :func:`~fedmerge.strategies.client_app` sends them. Replies are merged in client order, dtypes
    and integer buffers are kept, bad updates are dropped with a warning.

    Parameters
    ----------
    method
        Name of a method, such as ``"fednova"`` or ``"fedavg+server_adam"``, or a ready pipeline.
    model_fn
        Makes the model; methods that have to know the architecture need it, and it tells what is frozen
        (``requires_grad=False``): clients of :func:`~fedmerge.strategies.client_app` send and get only what they train.
    personal
        Patterns of tensors that stay with the clients, such as ``["head.*"]``; see :class:`~fedmerge.layout.Layout`.
    frozen_mode
        How frozen parts run while clients train, see :class:`~fedmerge.training.LocalTraining`.
    send_frozen
        ``"auto"`` sends a node all of the model until it has said that it makes frozen tensors itself, ``"never"``
        and ``"always"`` are for nodes that all do, or need not.
    seed
        Root of client sampling, of the method's random streams and of what clients draw.
    batch_norm, on_bad_update, repair, statistics, privacy, trust
        See :class:`~fedmerge.merging.Pipeline`; `statistics` may be a mapping, ``{"compression": "float16"}``. Noise
        is added by the clients themselves; masks are simulated, and hide nothing from the server of a deployment. With
        either, clients neither tell their training loss nor judge the model, see :class:`~fedmerge.refine.Privacy`.
    min_clients
        Fewest usable updates to merge.
    on_client_error, on_too_few, round_timeout
        See :class:`~fedmerge.strategies.policies.RoundPolicies`; `round_timeout` takes the place of :meth:`start`'s
        ``timeout``. A run that merged nothing ends with an error under either policy.
    data
        Batches on the server, for methods that use them; read once per merge, so pass a list or a loader.
    example
        What the model is called with, for methods that trace it; taken from `data` where there are any.
    checkpoint_dir, keep_checkpoints
        Where to leave a checkpoint after every merge, and how many of the last stay. :meth:`start` goes on from the
        newest that is whole. One folder serves one run.
    observers
        Who watches the rounds that :meth:`start` runs, and may end them; see :class:`fedmerge.observers.Observer`.
    fraction_train, fraction_evaluate, min_train_nodes, min_evaluate_nodes, min_available_nodes, \
weighted_by_key, arrayrecord_key, configrecord_key, train_metrics_aggr_fn, evaluate_metrics_aggr_fn
        As in ``flwr.serverapp.strategy.FedAvg``.
    options
        Hyper-parameters of the method.

    Raises
    ------
    UnknownName, InvalidOption
        The method, or an option of it, does not exist or has a wrong value, or a fraction or minimum has.

    Examples
    --------
    >>> MergeStrategy("fedatt", fraction_train=0.5, step_size=1.0).pipeline.aggregator
    FedAtt(step_size=1.0, norm='spectral', noise=0.0)
    """

    reads_messages: ClassVar[bool] = False
    """Whether a subclass makes messages or reads replies itself: then :meth:`start` has a message sent to each client.
    True of those that come by another ``configure_train`` or ``aggregate_train``, unless they say otherwise."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Note whether a subclass makes or reads messages."""
        super().__init_subclass__(**keywords)
        ours = [base for base in cls.__bases__ if issubclass(base, MergeStrategy)]
        unchanged = any(
            cls.configure_train is base.configure_train and cls.aggregate_train is base.aggregate_train for base in ours
        )
        if "reads_messages" not in vars(cls) and not unchanged:
            cls.reads_messages = True

    def __init__(
        self,
        method: str | Pipeline = "fedavg",
        *,
        model_fn: Callable[[], nn.Module] | None = None,
        personal: Iterable[str] = (),
        frozen_mode: FrozenMode = "eval",
        send_frozen: SendFrozen = "auto",
        seed: int = 0,
        batch_norm: BatchNormPolicy = "mean",
        on_bad_update: str = "drop",
        min_clients: int = 1,
        on_client_error: str = "skip",
        on_too_few: str = "raise",
        round_timeout: float | None = None,
        statistics: StatisticsSettings | Mapping[str, Any] | None = None,
        privacy: Privacy | None = None,
        trust: Trust | None = None,
        data: Iterable[Any] | None = None,
        example: Any = None,
        repair: str = "auto",
        checkpoint_dir: str | Path | None = None,
        keep_checkpoints: int = 3,
        observers: Iterable[ObserverLike] = (),
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: MetricsAggregation | None = None,
        evaluate_metrics_aggr_fn: MetricsAggregation | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            fraction_train=fraction_train,
            fraction_evaluate=fraction_evaluate,
            min_train_nodes=min_train_nodes,
            min_evaluate_nodes=min_evaluate_nodes,
            min_available_nodes=min_available_nodes,
            weighted_by_key=weighted_by_key,
            arrayrecord_key=arrayrecord_key,
            configrecord_key=configrecord_key,
            train_metrics_aggr_fn=train_metrics_aggr_fn,
            evaluate_metrics_aggr_fn=evaluate_metrics_aggr_fn,
        )
        check_participation({**vars(self), "seed": seed})
        if isinstance(method, Pipeline):
            own = {"privacy": privacy, "trust": trust}
            given = [*sorted(options), *(name for name, value in own.items() if value is not None)]
            if given:
                raise InvalidOption(f"options {given} go into the pipeline that was passed as method")
            self.pipeline = method
        else:
            check_keywords(method, options, MergeStrategy)
            self.pipeline = build_pipeline(
                method,
                {main_part(method).name: options},
                batch_norm=batch_norm,
                on_bad_update=on_bad_update,
                min_updates=min_clients,
                statistics=statistics_settings(statistics),
                privacy=privacy or Privacy(),
                trust=trust or Trust(),
                repair=repair,
            )
        self.seed, self.policies = seed, RoundPolicies(on_client_error, on_too_few, round_timeout)  # type: ignore[arg-type]
        self.memory: dict[str, Tensor] = {}
        """What the method remembers between rounds: part of a checkpoint."""
        self._checkpoints = (
            None if checkpoint_dir is None else StrategyCheckpoints(Path(checkpoint_dir), keep_checkpoints)
        )
        self.observers = make_observers(observers)
        self._watched = False
        self.answers = 0
        """Questions that a client has been asked at most, in all rounds so far: what :func:`fedmerge.refine.epsilon`
        counts. With a ``checkpoint_dir`` also those of earlier processes, and of rounds that were cut short."""
        self.last_report: MergeReport | None = None
        self._data, self._example = data, example
        if model_fn is not None:
            check_function("model_fn", model_fn)
        self.travel = Travel(model_fn, check_patterns(personal), frozen_mode, send_frozen)
        # Who averages metrics otherwise wants to see what each client reports.
        self._wants_messages = train_metrics_aggr_fn is not None or weighted_by_key != "num-examples"
        self._base: State | None = None
        self._grid: Grid | None = None
        self.identities = Identities()
        """What is known of clients and their nodes: part of a checkpoint, for nodes of a deployment outlive a run."""
        self._order: Order | None = None
        self._awaited: int | None = None
        self._asked_to_judge = self.last_evaluation = None
        self._run = RunOutcome()

    def adopt(self, run: RunSettings) -> None:
        """Take over the settings of a run, say of a comparison, that this strategy was made without.

        Raises
        ------
        InvalidOption
            It sets one of them otherwise itself, or keeps checkpoints of its own, which are those of the run.
        """
        if self._checkpoints is not None:
            raise InvalidOption("the strategy sets checkpoint_dir, but the run keeps checkpoints itself: leave it out")
        self.seed, self.policies = run.agreed_seed(self.seed), run.agreed_policies(self.policies)
        self.pipeline = run.agreed_pipeline(self.pipeline)
        self.travel = run.agreed_travel(self.travel)
        self.travel.facts["task"] = run.task
        self._data = run.data if self._data is None else self._data
        self._example = run.example if self._example is None else self._example

    def start(self, *arguments: Any, **keywords: Any) -> Result:
        """Run the rounds, as Flower's strategies do; on a grid of ours without a message per client.

        Only here, for whoever calls the other methods wants to see messages: a strategy wrapped around this one, or a
        subclass that makes or reads messages itself (:attr:`reads_messages`).

        Raises
        ------
        RecordError
            No checkpoint in ``checkpoint_dir`` can be used, or they are of another configuration or model.
        NoUsableUpdates
            A round had too few updates, under ``on_too_few="raise"``, or no round merged anything.
        """
        self._run, self.identities = RunOutcome(), Identities()
        given = check_start(super().start, arguments, keywords)
        if self.policies.round_timeout is not None:
            given["timeout"] = self.policies.round_timeout
        start = super().start if self.reads_messages else partial(run_rounds, self)
        if self._checkpoints is not None:
            start = partial(self._checkpoints.start, self, start)
        self._watched = True
        try:
            result = start_observed(self, self._checkpoints, start, given) if self.observers else start(**given)
        finally:
            self._watched = False
        return self._run.checked(result, given["initial_arrays"])

    def summary(self) -> None:
        """Log what merges, then Flower's own settings."""
        log.info("merge: %s", self.pipeline)
        for told in self.pipeline.privacy.limits(bool(self.pipeline.refinements), self.fraction_evaluate > 0):
            log.warning("privacy: %s", told)
        super().summary()

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
            check_server(self.pipeline.aggregator, self.travel.model_fn, self._data, self._example)
        goes_on = going_on(self.memory)
        if goes_on:  # `arrays` are an average that was judged, and clients train on from the model behind it
            arrays = to_arrays({**view_arrays(arrays), **goes_on})
        self.travel.check(arrays)
        check_nodes(grid, vars(self))
        before = () if self._order is None else self._order.numbers
        self._base, self._grid = view_arrays(arrays), grid
        if server_round <= 1:  # of a new run, also under a wrapper, whose start is not ours
            self.identities = Identities()
            self.travel.begin()
        self.identities.grid = grid
        config = ConfigRecord(dict(config))  # the caller's own is the next strategy's too
        fill_config(config, self.pipeline, self.seed, server_round)
        config.update(self.travel.told(self._base))
        nodes: Sequence[int] = ()
        if self.fraction_train:
            nodes = self._sampled(grid, self.fraction_train, self.min_train_nodes, "sampling", server_round)
            self._awaited = server_round
        missed = missed_by(self.memory, nodes)
        if missed:
            config[MISSED_KEY] = missed
        if nodes and self.pipeline.refinements and server_round == 1:  # later, clients that are gone end no run
            self.pipeline.privacy.check_clients(len(nodes))
        brief, whole = self._records(arrays, config)
        brought = self.pipeline.sent_with_model(self.memory)
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
            wanting=frozenset(node for node in nodes if not self.travel.completes(node)),
        )
        return self._order

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message] | Answer
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge what clients sent into the next global model: their replies, or what a grid of ours made of an order.

        Raises
        ------
        NoUsableUpdates
            Too few clients replied with an update that can be merged, under ``on_too_few="raise"``.
        ClientFailed
            One failed, under ``on_client_error="raise"``.
        """
        arrays_key, weight_key, self._awaited = self.arrayrecord_key, self.weighted_by_key, None
        self._own_models = OwnModels()
        answer = replies if isinstance(replies, Answer) else self._read(server_round, replies)
        self.travel.note(answer, arrays_key)
        failures = RoundFailures(self.policies)
        told = {"server-round": server_round, **self.travel.told(self._base or {})}
        if answer.failures:
            name = self.identities.naming(server_round)
            failures.note([failed_client(node, reason, server_round, name) for node, reason in answer.failed])
            check_mods(answer.heard)
        if answer.empty:
            reason = "no client replied with an update" if failures.clients else "no client was asked"
            return self._skipped(server_round, reason, (), failures.clients)
        keys, late = (arrays_key, self.configrecord_key, weight_key), self.policies.round_timeout
        layout = self.travel.layout if self.travel.completes(*answer.nodes.values()) else None

        def reach(**more: int) -> Reach:
            """The clients, for a method that asks them again, told `more` in every message."""
            return Reach(self._grid, answer.nodes, {**told, **more}, *keys, late, server_round, failures.note, layout)

        def stage(sent: Mapping[int, News], what: Stage) -> list[ClientUpdate]:
            more = {"seed": self.seed, KEEP_KEY: self.pipeline.compares}
            more |= {WITHHOLD_KEY: True} if self.pipeline.privacy.withholds_metrics else {}
            return exchange(reach(**more), sent, what)

        exchanges = count()
        asked = Billed(lambda them, who: ask(reach(), exchanges, them, who), partial(self._charge, server_round))
        context = MergeContext(
            base=self._base,
            round=server_round,
            seed=self.seed,
            data=self._data,
            example=self._example,
            model_fn=self.travel.merged_model if self.travel.model_fn else None,
            exchange=stage,
            ask=asked,
            population=None if self._order is None else self._order.context.population,
            **self.travel.facts,
        )
        try:
            result = answer.merge(self.pipeline, context, self.memory, self.travel.buffers)
        except NoUsableUpdates as error:
            return self._skipped(server_round, str(error), error.dropped, failures.clients, asked.questions)
        taken = set(result.accepted)
        if self.pipeline.batch_norm == "recalibrate":
            recalibrate(reach(), result.state, result.accepted, self.travel.norms)
        self.memory = keeping_missed(result.memory, self.memory)
        if answer.nodes:  # a grid may name none
            self._note_merged(server_round, {node for client, node in answer.nodes.items() if client in taken})
        self._own_models = OwnModels.of(result, answer.nodes, self._base, context.tied)
        if answer.contents:
            contents = [content for client, content in answer.contents.items() if client in taken]
            metrics = self.train_metrics_aggr_fn(alike(contents), self.weighted_by_key)
        else:
            metrics = answer.metrics(taken)
        self.last_report = MergeReport(
            server_round,
            result.accepted,
            result.dropped,
            answers=asked.questions,
            failed=tuple(failures.clients),
            refused=result.refused,
            steps_skipped=result.skipped,
            bytes_personal=self._own_models.bytes,
            metrics=dict(metrics or {}),
        )
        arrays = to_arrays(result.state)
        if self._checkpoints is not None:
            self._checkpoints.save(self, server_round, arrays)
        return arrays, metrics

    def _read(self, round: int, replies: Iterable[Message]) -> Answer:
        order, keys = self._order, (self.arrayrecord_key, self.weighted_by_key)
        sent = None if order is None else Sent(order.nodes, order.messages(), order.before)
        return read_replies(replies, sent, keys, round, self.identities)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the merged model to those who judge it on their held-out examples.

        Raises
        ------
        NoUsableUpdates
            A wrapper kept this round's replies, as Flower's for differential privacy do where a client failed, under
            ``on_too_few="raise"``.
        """
        if self._awaited == server_round:
            self._awaited = None
            self._skipped(server_round, WITHHELD, (), ())
        return super().configure_evaluate(server_round, arrays, config, grid)

    def _note_merged(self, round: int, nodes: Collection[int]) -> None:
        """Remember whose replies were merged, where clients keep what goes with them."""
        rule = self.pipeline.aggregator.local_rule
        if rule is not None and rule.keeps and self._order is not None:
            self.memory = noted(self.memory, self._order.nodes, nodes, round)

    def _charge(self, round: int, questions: int) -> None:
        self.answers += questions
        if self._checkpoints is not None:
            self._checkpoints.charge(round, questions)

    def _skipped(
        self,
        round: int,
        reason: str,
        dropped: Sequence[BadUpdate],
        failed: Sequence[ClientFailed],
        answers: int = 0,
    ) -> tuple[None, None]:
        """Keep the model as it is, which is what Flower makes of no arrays, where that is the policy."""
        if self.fraction_train == 0.0:  # nobody is to train
            return None, None
        self._note_merged(round, ())
        error = too_few(round, reason, dropped, failed)
        self._run.skip(error)
        told = str(error).removeprefix(f"round {round}: ")
        self.last_report = MergeReport(round, (), error.dropped, skipped=told, answers=answers, failed=error.failed)
        asked = self._order is not None and len(self._order.nodes) > 0
        if self.policies.on_too_few == "raise" and (asked or failed or dropped):
            raise error
        log.warning("round %d: the model stays as it is: %s", round, reason)
        return None, None
