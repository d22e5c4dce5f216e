"""What a client sends, and what a merge knows besides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.errors import InvalidOption, MissingStatistic
from fedmerge.layout import Layout
from fedmerge.models.resize import resize
from fedmerge.questions import Ask
from fedmerge.questions.stages import News, Stage
from fedmerge.seeding import torch_generator
from fedmerge.state import State
from fedmerge.tasks import Task
from fedmerge.training.judged import Judged, judge

__all__ = ["ClientUpdate", "MergeContext", "StackedUpdates"]


@dataclass(frozen=True)
class ClientUpdate:
    """One client's model after local training.

    Parameters
    ----------
    client
        Stable identity; updates are merged in its order.
    state
        The trained tensors, under ``state_dict`` names.
    weight
        Number of examples; only the ratios between clients matter.
    statistics
        What the client measured, by statistic name; see :mod:`fedmerge.statistics`.
    """

    client: int
    state: State
    weight: float = 1.0
    statistics: Mapping[str, State] = field(default_factory=dict)

    def statistic(self, name: str) -> State:
        """The measured statistic called `name`.

        Raises
        ------
        MissingStatistic
            The client did not send it.
        """
        if name not in self.statistics:
            raise MissingStatistic(
                self.client,
                f"statistic {name!r} is missing",
                "Clients made by fedmerge.strategies.client_app send it, a ClientApp of your own does after "
                "fedmerge.strategies.add_statistics(reply, message, model, loader); fedmerge.merge takes it as "
                "statistics=.",
            )
        return self.statistics[name]


@dataclass(frozen=True)
class StackedUpdates:
    """Models of many clients in one set of tensors, as they come out of training that stacks them.

    Parameters
    ----------
    clients
        Their numbers, ascending.
    states
        Tensors [K, ...], one row per client.
    weights
        Numbers of examples.
    statistics
        What each measured.
    """

    clients: tuple[int, ...]
    states: State
    weights: tuple[float, ...]
    statistics: tuple[Mapping[str, State], ...]

    def __len__(self) -> int:
        return len(self.clients)

    def __getitem__(self, rows: slice) -> StackedUpdates:
        """Some of the clients; views."""
        states = {name: stacked[rows] for name, stacked in self.states.items()}
        return StackedUpdates(self.clients[rows], states, self.weights[rows], self.statistics[rows])

    def __iter__(self) -> Iterator[ClientUpdate]:
        """The clients one by one; their tensors are views."""
        for k, client in enumerate(self.clients):
            state = {name: stacked[k] for name, stacked in self.states.items()}
            yield ClientUpdate(client, state, self.weights[k], self.statistics[k])


@dataclass(frozen=True)
class MergeContext:
    """What a merge may use besides the updates.

    Parameters
    ----------
    base
        The model sent out this round, from which all clients started (theta_0).
    round
        Number of the round, from 1.
    seed
        Root of every random stream of this merge.
    data
        Batches on the server, for methods that use them.
    example
        What the model is called with, for methods that trace it: one batch of inputs, a tuple of arguments, or
        keywords, see :func:`~fedmerge.inputs.arguments_of`.
    model_fn
        Makes a module of the architecture, for methods that have to run it.
    exchange
        Tells each client what is new and has it train on, for methods with several exchanges; the answers of those
        that replied hold what the stage asks for. None where clients cannot be reached.
    task
        What the model is to do, where the server judges it; read from labels where not given.
    ask
        Puts questions about a merged model to clients, see :data:`~fedmerge.questions.Ask`.
    frozen
        Names of tensors that clients do not train, or keep. Those that are equal in all updates are not merged.
    layout
        Which tensors travel, where it is not all: the others are those of the base in every update.
    known
        Tensors of the base that aggregators do not see, for whoever runs a model.
    tied
        By further names of shared parameters, the one name under which they are merged.
    left_out
        How many clients replied with an update that could not be used, once all others have been read.
    population
        How many clients the federation has, be they asked in this round or not; None where nobody knows.
    told
        How many examples each client told of in training: it answers for no more. The updates' weights where not given.
    signed
        Whether weights below 0 are good ones, of models to be subtracted; never those of a federation's clients.
    """

    base: State | None = None
    round: int = 1
    seed: int = 0
    data: Iterable[Any] | None = None
    example: Any = None
    model_fn: Callable[[], nn.Module] | None = None
    exchange: Callable[[Mapping[int, News], Stage], list[ClientUpdate]] | None = None
    ask: Ask | None = None
    task: Task | None = None
    frozen: frozenset[str] = frozenset()
    layout: Layout | None = None
    known: State = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    left_out: Callable[[], int] = int
    told: Mapping[int, float] | None = None
    population: int | None = None
    signed: bool = False

    def required_base(self, method: str) -> State:
        """`base`, or an error that tells how to give one.

        Raises
        ------
        InvalidOption
            There is no base.
        """
        if self.base is None:
            raise InvalidOption(
                f"{method} works on updates relative to the model all clients started from: pass base=."
            )
        return self.base

    def torch_generator(self, purpose: str) -> torch.Generator:
        """A random stream of this round for one purpose."""
        return torch_generator(self.seed, purpose, self.round)

    def module(self, state: State, method: str) -> nn.Module:
        """A module with the tensors of `state`, at their widths; what is not in it is the base's or ``model_fn``'s.

        Raises
        ------
        InvalidOption
            There is no ``model_fn``.
        """
        module = self._module(method)
        return resize(module, {**module.state_dict(), **self.known, **state})

    def _module(self, method: str) -> nn.Module:
        if self.model_fn is None:
            raise InvalidOption(f"{method} has to know the model: pass model_fn=.")
        return self.model_fn()

    def trained(self, state: State, method: str) -> dict[str, Tensor]:
        """The parameters of `state` that are trained, without buffers."""
        names = {name for name, _ in self._module(method).named_parameters(remove_duplicate=False)} - self.frozen
        return {name: tensor for name, tensor in state.items() if name in names}

    def inputs(self, method: str) -> Iterator[Any]:
        """The server's inputs, without their labels.

        Raises
        ------
        InvalidOption
            There are none.
        """
        if self.data is None:
            raise InvalidOption(
                f"{method} needs inputs on the server: pass data= (server_examples in a configuration)."
            )
        for batch in self.data:
            yield batch[0] if isinstance(batch, tuple | list) else batch

    def shown(self, method: str) -> Any:
        """One batch of inputs: the example, or the first of the data.

        Raises
        ------
        InvalidOption
            There is neither.
        """
        example = self.example
        if example is None and self.data is not None:
            example = next(iter(self.inputs(method)), None)
        if example is None:
            raise InvalidOption(f"{method} has to trace the model: pass example=, one batch of inputs.")
        return example

    def score(self, state: State, method: str) -> float:
        """How good the model with these parameters is on the server's data: the larger the better.

        It is the accuracy, or minus the loss in tasks that have none.

        Raises
        ------
        InvalidOption
            There are no data with labels, or no ``model_fn``; or a part of the model is personal, so that there is none
            to judge here.
        """
        if self.layout is not None and self.layout.personal:
            raise InvalidOption(
                f"{method} judges models on the server, and {self.layout.personal[0]!r} is personal: only clients have "
                "a whole model. Take a variant that does not search by accuracy, or a method without data"
            )
        pairs = list(self.data or ())
        if not pairs or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
            raise InvalidOption(
                f"{method} judges models on the server: pass data= with (inputs, targets) batches "
                "(server_examples in a configuration)."
            )
        module = self.module(state, method)
        judged = sum((judge(module, x, y, what="data=", task=self.task) for x, y in pairs), Judged())
        return -judged.loss if judged.hits is None else judged.accuracy
