"""The client side: a Flower ClientApp that trains, evaluates and measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from fedmerge.adapters import OwnRanks
from fedmerge.clients.answers import Answers
from fedmerge.clients.client import Client, Mishaps, Tamper
from fedmerge.data.client_data import ClientData
from fedmerge.errors import InvalidOption, shown
from fedmerge.layout import check_patterns
from fedmerge.lookup.keyword_check import check_function
from fedmerge.tasks import TaskLike, either
from fedmerge.training.local import LocalTraining
from fedmerge.wire.keys import ACTION

__all__ = ["FedmergeClientApp", "Mod", "client_app"]

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]
"""A mod of Flower's, such as ``flwr.clientapp.mod.LocalDpMod(...)``."""


def client_app(
    model_fn: Callable[[], nn.Module],
    data_fn: Callable[[int, int], ClientData],
    *,
    training: LocalTraining | None = None,
    device: str = "auto",
    own_model_fn: Callable[[int], nn.Module] | None = None,
    tamper: Tamper | None = None,
    mishaps: Mishaps | None = None,
    mods: Sequence[Mod] = (),
    noise_seed: int | None = None,
    task: TaskLike | None = None,
    loss: TaskLike | None = None,
    personal: Iterable[str] = (),
    own_ranks: OwnRanks | None = None,
) -> ClientApp:
    """Make a Flower ClientApp that answers every message of our strategies, and those of stock ones.

    It trains on ``train``, judges the model on the client's held-out examples on ``evaluate``, and measures
    statistics of the model it is sent on ``query`` (``query.statistics``); ``query.partition`` asks only which
    partition it holds. To a strategy that asks for no
    statistics it replies just as any ClientApp: one ArrayRecord, one MetricRecord with ``num-examples``.

    Parameters
    ----------
    model_fn
        Makes the model. Values of what is trained do not matter, for every message brings them; frozen tensors
        (``requires_grad=False``) are not sent, so it has to make those of the server: from the same file or seed. So
        it has with ``LocalTraining(linearised=...)``, where the model is linearised around what it makes.
    data_fn
        ``data_fn(partition_id, num_partitions)`` gives the client's examples.
    training
        How to train; a message's ConfigRecord overrides its fields, with ``-`` for ``_``
        (``proximal-mu``, as Flower's FedProx sends it) and under the names of Flower's templates (``lr``,
        ``local-epochs``). What nobody reads in it is an error; with `mods`, which may read it, it is not.
    device
        ``"auto"`` takes a GPU where the process has one.
    own_model_fn
        ``own_model_fn(partition_id)`` makes the model that a client starts the first round from instead of the one
        sent, at a width of its own where the method can merge that. Models may then be wider than `model_fn` says:
        what a message brings decides.
    tamper
        ``tamper(state, base, client, round)`` gives the parameters that a client sends, having trained from `base` to
        `state`: what hostile clients do to their models. Statistics are measured on what it gives.
    mishaps
        Faults of clients, as :class:`fedmerge.simulation.scenarios.faults.Mishaps` draws them: crashes before training,
        damage on the way of what is sent.
    mods
        Flower's mods around whatever sends arrays: training, and statistics in messages of their own. Not around
        evaluation and the question for the partition, to which its mods that clip would answer with an error.
    noise_seed
        Root of the noise that clients add to sums where they are asked to: for simulations, which are to be repeatable.
        Otherwise the operating system seeds it, for noise that the server can draw as well protects nothing.
    task
        What the model is to do: ``"regression"``, ``"binary"``, a loss such as ``nn.MSELoss()``, or a
        :class:`~fedmerge.tasks.Task`. By its loss clients train and judge, and statistics are of its likelihood;
        classification where not given.
    loss
        Another name of `task`.
    personal
        Patterns of tensors that never leave a client, such as ``["head.*"]``: it trains them, keeps them in its Context
        and is judged with them. Left out, those that the server's messages name.
    own_ranks
        Ranks and alphas of clients, of the low-rank adapters that the model has, see
        :class:`fedmerge.adapters.OwnRanks`.

    Raises
    ------
    InvalidOption
        `model_fn` or `data_fn` is no function of these parameters, or `training` something else; or linearised clients
        start apart.

    Returns
    -------
    ClientApp
        Metrics of its replies: ``num-examples``, ``train_loss`` (not where a message says ``withhold-metrics``),
        ``local-steps``; ``eval_loss``, ``eval_acc`` (not in a regression).

    Examples
    --------
    >>> import torch
    >>> rows = torch.randn(10, 4), torch.zeros(10, dtype=torch.long)
    >>> app = client_app(lambda: nn.Linear(4, 2), lambda partition, total: ClientData(*rows, *rows))
    >>> isinstance(app, ClientApp)
    True
    """
    check_function("model_fn", model_fn)
    check_function("data_fn", data_fn, ("partition_id", "num_partitions"))
    settings = LocalTraining() if training is None else training
    if not isinstance(settings, LocalTraining):
        raise InvalidOption(f"training must be a LocalTraining(...), got {shown(settings)}")
    told = either(task, loss)
    kept = check_patterns(personal)
    if own_ranks is not None and not isinstance(own_ranks, OwnRanks):
        raise InvalidOption(f"own_ranks must be a fedmerge.adapters.OwnRanks(...), got {shown(own_ranks)}")
    client = Client(
        model_fn, data_fn, settings, device, own_model_fn, tamper, mishaps, noise_seed, bool(mods), told, kept,
        own_ranks,
    )  # fmt: skip
    return FedmergeClientApp(client, mods)


class FedmergeClientApp(ClientApp):
    """A ClientApp that shows what answers its messages, to whoever can do without messages."""

    def __init__(self, client: Client, mods: Sequence[Mod] = ()) -> None:
        super().__init__()
        self.client, self.mods = client, tuple(mods)
        answers = Answers(client)
        self.train(mods=list(mods))(answers.train)
        self.evaluate()(answers.evaluate)
        self.query(mods=list(mods))(answers.query)
        self.query("statistics", mods=list(mods))(answers.query)
        self.query(ACTION, mods=list(mods))(answers.questions)
        self.query("partition")(answers.partition)

    def with_data(self) -> FedmergeClientApp:
        """The same app with its data in it, where ``data_fn`` can say which (``data_fn.loaded()``), for processes
        that share memory; as it stands it makes them from settings, wherever it runs."""
        loaded = getattr(self.client.data_fn, "loaded", None)
        return self if loaded is None else FedmergeClientApp(replace(self.client, data_fn=loaded()), self.mods)
