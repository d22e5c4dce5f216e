"""Merging models that are at hand, without a federation."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedmerge.checks.raw_errors import named
from fedmerge.checks.validation import common_form
from fedmerge.errors import InvalidOption
from fedmerge.inputs import OnDeviceOf, beside, joined
from fedmerge.matching.widths import check_equal_widths
from fedmerge.merging import build_pipeline, main_part
from fedmerge.models.resize import resize
from fedmerge.offline.arguments import MergeArguments, check_keywords, check_method, check_policies, check_signs
from fedmerge.offline.at_hand import AtHand, check_base_widths, plain_modules
from fedmerge.offline.compute import as_sent, statistics_of
from fedmerge.offline.equal_depth import equally_deep
from fedmerge.offline.given_statistics import check_statistics, named_statistics
from fedmerge.offline.left_out import LeftOut, with_tensors, without_names
from fedmerge.offline.loaders import first_inputs
from fedmerge.offline.merged_parts import check_parts, merged_state
from fedmerge.offline.rows import RowLabels
from fedmerge.offline.tangent_models import as_linearised
from fedmerge.questions import Answer, Ask, Question, Trust, respond
from fedmerge.questions.stages import News, Stage, catch_up
from fedmerge.refine.privacy import Privacy
from fedmerge.routing import RoutedModel
from fedmerge.seeding import torch_generator
from fedmerge.state import trained_names
from fedmerge.statistics import Batches
from fedmerge.tasks import Reading, Task, TaskLike, either, outputs_like, reading_of
from fedmerge.training.local import LocalTraining, train
from fedmerge.update import ClientUpdate, MergeContext

__all__ = ["asked_at_hand", "merge"]


def merge(
    models: Sequence[nn.Module],
    method: str = "fedavg",
    *,
    weights: Sequence[float] | None = None,
    base: nn.Module | None = None,
    statistics: Sequence[Mapping[str, Any]] | None = None,
    data: Iterable[Any] | None = None,
    clients: Sequence[Batches] | None = None,
    example: Any = None,
    task: TaskLike | None = None,
    loss: TaskLike | None = None,
    repair: Literal["auto", "rescale", "none"] = "auto",
    privacy: Privacy | None = None,
    trust: Trust | None = None,
    only: Sequence[str] | None = None,
    leave_out: Sequence[str] = (),
    left_from: Literal["first", "base"] = "first",
    pattern_weights: Mapping[str, Sequence[float]] | None = None,
    rows: RowLabels | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Merge trained models of one architecture into a new one.

    Parameters
    ----------
    models
        Modules of one architecture, or of unequal depth for ``clafusion``; none is modified. The merge is made on the
        first one's device, to which copies of whatever lies elsewhere are moved.
    method
        A name of :func:`methods`; ``+`` adds server steps and refinements, as in
        ``"fedavg+ridge_head"``.
    weights
        One number per model, such as its examples; only their ratios matter. Equal where not given. Methods on task
        vectors, such as ``task_arithmetic``, subtract models of negative weight.
    base
        The model that all started from, for methods that merge updates (``fednova``, ``fedatt``).
    statistics
        One mapping per model, as :func:`~fedmerge.compute_statistics` returns it.
    data
        Batches of inputs, or ``(inputs, targets)``, on the server, for methods that use them.
    clients
        One loader of ``(inputs, targets)`` batches per model: statistics not given are measured there.
    example
        What the models are called with, for methods that trace them: one batch of inputs, a tuple of arguments, or
        keywords in a mapping.
    task
        What the models were trained for, for methods that look at labels: ``"classification"``, ``"binary"``,
        ``"regression"``, a loss such as ``nn.MSELoss()``, or a :class:`~fedmerge.tasks.Task`. Read from outputs and
        targets where not given, see :func:`~fedmerge.tasks.read_task`.
    loss
        Another name of `task`.
    repair
        What follows a method that re-orders neurons, see :class:`~fedmerge.merging.Pipeline`.
    privacy
        Masks and noise for what clients answer to refinements, see :class:`~fedmerge.refine.privacy.Privacy`.
    trust
        How far single `clients` are believed in them, see :class:`~fedmerge.refine.Trust`.
    only, leave_out
        Patterns of the tensors to merge, and of those not to, such as ``["head.*"]``; a layer's name stands for all
        that is in it. What is left out is not measured, matched or changed, neurons that it holds stay in their order,
        and it may have other shapes in each model, or other names: see :func:`~fedmerge.with_part`.
    left_from
        Whose it is in the result: that of the ``"first"`` model, or that of the ``"base"``.
    pattern_weights
        Weights for some tensors, such as ``{"head.*": [1, 0]}``; of several patterns that fit, the first counts, and a
        model of weight 0 has no part in those tensors. Not for methods that look at whole models.
    rows
        What the rows of tensors of unequal length stand for, in each model, such as ``{"embed.weight": [words_a,
        words_b]}``. Rows that several have are merged, others are kept: the result has the rows of
        :func:`~fedmerge.joined_labels`. For methods that need nothing but tensors.
    seed
        Root of the method's random streams, where it has any.
    options
        Hyper-parameters of the method.

    Returns
    -------
    nn.Module
        A new module; linearised where the method or the models are, see :class:`~fedmerge.models.tangent.Tangent`; of
        methods that route, a :class:`~fedmerge.routing.RoutedModel`, which is called like `models`.

    Raises
    ------
    UnknownName
        No such method or option.
    InvalidOption
        An option out of range, or something the method needs is not given.
    TaskError
        The task has to be known, and outputs and targets do not tell; or the targets are none of it.
    BadUpdate
        A model that cannot be merged with the others: NaN, missing tensor, wrong shape, zero weight.

    Examples
    --------
    >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> merged = merge([a, b], "fedavg", weights=[3, 1])
    >>> bool(((0.75 * a.weight + 0.25 * b.weight) - merged.weight).abs().max() < 1e-6)
    True
    """
    check_method(method)
    with named(f"merge by {method}"):
        check_keywords(method, options, inspect.signature(merge).parameters)
        part = LeftOut.of(only, leave_out, left_from, with_base=base is not None)
        hand = AtHand.of(equally_deep(plain_modules(models), method, example, data), base, part)
        check_policies(repair, privacy, trust)
        (privacy or Privacy()).check_clients(len(hand.models))
        arguments = MergeArguments.of(hand, weights, statistics, data, clients, example, seed)
        # A model handed over here that cannot be merged is the caller's mistake, not a remote client's fault.
        pipeline = build_pipeline(
            method,
            {main_part(method).name: options},
            on_bad_update="raise",
            repair=repair,
            privacy=privacy or Privacy(),
            trust=trust or Trust(),
        )
        if pipeline.aggregator.local_rule:
            raise InvalidOption(
                f"{method} changes how clients train, and these models are trained already: merge them by fedavg, "
                "which is all that its server does"
            )
        check_signs(arguments.weights, method, pipeline.aggregator)
        check_parts(hand, pipeline, method, pattern_weights, rows, asks=clients is not None)
        models, clients = hand.models, arguments.clients
        if clients is not None:
            clients = [OnDeviceOf(models[0], client_loader) for client_loader in clients]
        if not pipeline.aggregator.may_change_width and pattern_weights is None and rows is None:
            check_base_widths(hand.base, hand.states)
            check_equal_widths(hand.states, hand.base or common_form(hand.states), method)
        models = as_linearised(models, hand.base, pipeline)
        hand = replace(hand, models=tuple(models))
        if pipeline.aggregator.server_data != "none" and data is None:
            labels = " with labels" if pipeline.aggregator.server_data == "labels" else ""
            raise InvalidOption(f"{method} needs batches{labels} on the server: pass data=.")
        asked = pipeline.measured or pipeline.refinements or pipeline.aggregator.several_exchanges
        chosen_task = either(task, loss)
        reading = Reading(chosen_task)
        shown = hand.measured(first_inputs(clients), chosen_task) if clients is not None and asked else models
        updates = []
        check_statistics(arguments.statistics, pipeline.measured, measured=clients is not None)
        for i, model in enumerate(shown):
            known = {} if arguments.statistics is None else arguments.statistics[i]
            loader = None if clients is None else clients[i]
            with named_statistics(arguments.statistics):
                measured = statistics_of(i, pipeline.measured, known, model, loader, reading)
            if pipeline.aggregator.upload is not None:
                measured = as_sent(measured, model, pipeline.sent_as)
            measured = {kind: without_names(value, hand.left) for kind, value in measured.items()}
            updates.append(ClientUpdate(i, hand.states[i], arguments.weights[i], beside(models[0], measured)))
        context = MergeContext(
            base=hand.base,
            seed=arguments.seed,
            data=None if arguments.data is None else OnDeviceOf(models[0], arguments.data),
            example=beside(models[0], arguments.shown(traced=pipeline.aggregator.requires_model)),
            model_fn=hand.made,
            exchange=None if clients is None else _Clients(shown, clients, arguments.seed, reading),
            ask=None
            if clients is None
            else asked_at_hand(
                shown[0], clients, arguments.seed, shown, reading, frozenset() if hand.apart is None else hand.left
            ),
            task=chosen_task,
            frozen=hand.frozen & set(hand.states[0]),
            tied=hand.tied,
            told={},  # weights may be any, and loaders at hand tell their own length
            signed=True,
        )
        with named_statistics(arguments.statistics):
            state, routing = merged_state(pipeline, hand, updates, context, method, pattern_weights, rows)
        # The base's buffers stay where all models are subtracted.
        merged = resize(models[0], {**models[0].state_dict(), **(hand.base or {}), **state})
        return merged if routing is None else RoutedModel(merged, routing)


def asked_at_hand(
    model: nn.Module,
    clients: Sequence[Batches],
    seed: int = 0,
    own: Sequence[nn.Module] | None = None,
    task: Task | Reading | None = None,
    left: Collection[str] = (),
) -> Ask:
    """Clients whose loaders are at hand: each answers with what it would send, and nothing else of its data.

    `seed` is the root of the noise that clients add, where they are asked to; `own` are the models that they trained,
    `task` is what for; read from outputs and targets where not given. `left` are names of tensors that are not merged
    and differ: each client answers about the merged model with its own in their place, and tells nothing of them.
    """
    generators = [torch_generator(seed, "noise", client) for client in range(len(clients))]

    reading = reading_of(task)

    def answer(question: Question, i: int) -> Answer:
        trained, client_model = None if own is None else own[i], model
        own_part: dict[str, Tensor] = {}
        if own is not None and left:
            client_model = own[i]
            own_part = {name: tensor for name, tensor in client_model.state_dict().items() if name in left}
            question = replace(question, base=with_tensors(question.base, own_part, left))
        if i in question.own:
            trained = resize(client_model, with_tensors(question.own[i], own_part, left))
        given = respond(question, client_model, clients[i], generators[i], trained, reading)
        if not left:
            return given
        return replace(given, statistics={kind: without_names(v, left) for kind, v in given.statistics.items()})

    def ask(questions: Sequence[Question], asked: Sequence[int]) -> list[tuple[int, list[Answer]]]:
        return [(i, [answer(one_question, i) for one_question in questions]) for i in sorted(asked)]

    return ask


class _Clients:
    """Further exchanges with clients whose models and loaders are at hand."""

    def __init__(self, models: Sequence[nn.Module], clients: Sequence[Batches], seed: int, reading: Reading) -> None:
        self._model, self._clients, self._seed, self._reading = models[0], clients, seed, reading
        self._kept = [dict(model.state_dict()) for model in models]

    def __call__(self, sent: Mapping[int, News], stage: Stage) -> list[ClientUpdate]:
        answers = []
        for client, news in sent.items():
            module = resize(self._model, catch_up(self._kept[client], news))
            trained = trained_names(module)
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name in trained and name not in stage.frozen)
            pairs = list(self._clients[client])
            x, y = joined([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
            task = self._reading.of(module, pairs)(x, outputs_like(module, x), y)
            settings = LocalTraining(epochs=stage.epochs)
            train(module, x, y, settings, seed=self._seed, client=client, round=stage.number, task=task)
            self._kept[client] = dict(module.state_dict())
            state = {name: self._kept[client][name] for name in stage.send}
            answers.append(ClientUpdate(client, state, len(y)))
        return answers
