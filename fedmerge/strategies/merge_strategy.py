"""Any aggregator as a Flower strategy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from fedmerge.errors import InvalidOption, NothingMerged
from fedmerge.layout import BatchNormPolicy, FrozenMode, check_patterns
from fedmerge.lookup.keyword_check import check_function
from fedmerge.merging import Pipeline, build_pipeline, main_part
from fedmerge.models.tangent import linearised_maker
from fedmerge.observers import ObserverLike, make_observers
from fedmerge.questions import Trust
from fedmerge.refine import Privacy
from fedmerge.statistics import StatisticsSettings
from fedmerge.strategies.identity import Identities
from fedmerge.strategies.keywords import check_keywords, check_server, statistics_settings
from fedmerge.strategies.merge_report import MergeReport
from fedmerge.strategies.merging_replies import MergesReplies
from fedmerge.strategies.numbering import start_after
from fedmerge.strategies.observed import Watched
from fedmerge.strategies.participation import check_participation
from fedmerge.strategies.policies import RoundPolicies
from fedmerge.strategies.resume import StrategyCheckpoints, warn_of_lost_memory
from fedmerge.strategies.rounds import run_rounds
from fedmerge.strategies.run_outcome import RunOutcome, check_start
from fedmerge.strategies.run_settings import RunSettings
from fedmerge.strategies.travel import SendFrozen, Travel

__all__ = ["MergeReport", "MergeStrategy"]

log = logging.getLogger("fedmerge")

MetricsAggregation = Callable[[list[RecordDict], str], MetricRecord]


class MergeStrategy(MergesReplies):
    """A Flower strategy that merges with any method of :func:`fedmerge.methods`.

    It takes replies of a stock ClientApp (one ArrayRecord, ``num-examples``); methods that need statistics ask for them
    in the ConfigRecord and find them as further records of the reply, as :func:`~fedmerge.strategies.client_app` sends
    them. Replies are merged in client order, dtypes and integer buffers are kept, bad updates are dropped with a
    warning.

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
    """Whether a class makes messages or reads replies itself: then :meth:`start` has a message sent to each client. A
    subclass that does not say does; one that only sets options says ``reads_messages = False``, and simulations of it
    are as fast as those of this class."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Each class speaks for itself: what is under a parent's name may be about messages in its child."""
        super().__init_subclass__(**keywords)
        if "reads_messages" not in vars(cls):
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
        kept = None if checkpoint_dir is None else StrategyCheckpoints(Path(checkpoint_dir), keep_checkpoints)
        self._checkpoints = kept
        self.observers = make_observers(observers)
        self._watched = False
        self.answers = 0
        """Questions that a client has been asked at most, in all rounds so far: what :func:`fedmerge.refine.epsilon`
        counts. With a ``checkpoint_dir`` also those of earlier processes, and of rounds that were cut short."""
        self.last_report: MergeReport | None = None
        self._data, self._example = data, example
        if model_fn is not None:
            check_function("model_fn", model_fn)
            model_fn = linearised_maker(model_fn, self.pipeline.linearises)
        self.travel = Travel(model_fn, check_patterns(personal), frozen_mode, send_frozen)
        # Who averages metrics otherwise wants to see what each client reports.
        self._wants_messages = train_metrics_aggr_fn is not None or weighted_by_key != "num-examples"
        self.identities = Identities()
        """What is known of clients and their nodes: part of a checkpoint, for nodes of a deployment outlive a run."""
        self._base = self._grid = self._order = self._awaited = None
        self._asked_to_judge = self.last_evaluation = self.worst_accuracy = self._entries = None
        self._own_models = None
        self._run, self._done = RunOutcome(), None

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
        check_server(self.pipeline, self.travel, self._data, self._example)

    def begin_after(self, done: int) -> None:
        """Have the next :meth:`start` go on after round `done`, which was run elsewhere: say, before an interruption.

        Its ``initial_arrays`` are then the model of that round, and its ``num_rounds`` is the number of the last round.
        The model of that round is not evaluated again.
        """
        self._done = done

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
        self._run, self.identities, self._own_models = RunOutcome(), Identities(), None
        given = check_start(super().start, arguments, keywords)
        if self.policies.round_timeout is not None:
            given["timeout"] = self.policies.round_timeout
        self._watched = True
        try:
            result = self._start_watched(given) if self.observers else self._start_or_resume(**given)
        finally:
            self._watched, self._done = False, None
        return self._run.checked(result, given["initial_arrays"])

    def _start_watched(self, given: Mapping[str, Any]) -> Result:
        """Tell observers of every round; a run that they end is ended in its checkpoints too."""
        kept, name = self._checkpoints, repr(self.pipeline)
        folder = None if kept is None else kept.folder
        watched = Watched(
            self.observers, name, lambda: (self.last_report, self.last_evaluation), seed=self.seed, folder=folder
        )
        result = watched.start(self._start_or_resume, given)
        if watched.stopped is not None and self.fraction_train and not result.arrays:
            raise NothingMerged(f"an observer has ended the run before a round merged anything: {watched.stopped}")
        if watched.stopped is not None and kept is not None:
            kept.stop(watched.stopped)
        return result

    def _start_or_resume(self, **given: Any) -> Result:
        """Run the rounds, after those of the newest checkpoint if there is one."""
        kept = self._checkpoints
        if kept is None:
            return self._run_rounds(self._done, given)
        with kept.locked():
            self.answers = kept.charged()
            initial, last = given["initial_arrays"], given["num_rounds"]
            past = kept.past(self._lasting(), initial, last, watched=bool(self.observers))
            if past is None:
                return self._run_rounds(self._done, given)
            warn_of_lost_memory(self.pipeline, personal=bool(self.travel.personal))
            self.memory, self.identities = past.memory, past.identities
            given |= {"initial_arrays": past.arrays, "num_rounds": past.num_rounds}
            # The server may have died between the merge, which is saved, and the test of its model.
            return self._run_rounds(past.round, given, evaluate_again=True)

    def _run_rounds(self, done: int | None, given: Mapping[str, Any], *, evaluate_again: bool = False) -> Result:
        if not self.reads_messages:
            return run_rounds(self, **given, done=done, evaluate_again=evaluate_again)
        if done is None:
            return super().start(**given)
        return start_after(done, self, **given, evaluate_again=evaluate_again)

    def summary(self) -> None:
        """Log what merges, then Flower's own settings."""
        log.info("merge: %s", self.pipeline)
        for told in self.pipeline.privacy.limits(bool(self.pipeline.refinements), self.fraction_evaluate > 0):
            log.warning("privacy: %s", told)
        super().summary()
