"""Layout: which of a model's tensors are trained, frozen, personal or buffers, and so which of them travel."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from fedmerge.errors import InvalidOption, UnknownName
from fedmerge.state import State, is_mask, is_norm_statistic, is_number, module_state, tied_names, trained_names

__all__ = [
    "BatchNormPolicy",
    "FrozenMode",
    "Layout",
    "check_patterns",
    "freeze",
    "frozen_parts",
    "matching_names",
    "owners",
    "without_personal",
]

FrozenMode = Literal["eval", "train"]
"""How frozen parts run while clients train: ``eval``, as in use, or ``train``, with dropout and batch statistics."""


@dataclass(frozen=True)
class Layout:
    """The names of a model's tensors, sorted once by what becomes of them.

    What clients train travels, and the buffers that belong to it: ``trained``, ``float_buffers``,
    ``integer_buffers``. The rest is ``still``: frozen tensors are known on both sides, for ``model_fn`` makes the
    same ones everywhere, and personal ones stay with the client that trains them.

    A part of a model is frozen if it has parameters and all of them are: its buffers, such as the running statistics
    of batch norms, are frozen too, for frozen parts run as in use while clients train (``frozen_mode="eval"``).
    Under ``"train"`` their statistics follow each client's batches, so they travel.

    Parameters
    ----------
    trained
        Parameters that clients train and the server merges; of a shared one its first name.
    float_buffers, integer_buffers
        Buffers that travel.
    frozen
        Parameters that nobody trains.
    frozen_buffers
        Buffers of frozen parts.
    personal
        Parameters that a client trains and keeps, and the buffers of parts that are personal as a whole.
    tied
        By further names of shared parameters, their first.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Linear(2, 2))
    >>> _ = model[:2].requires_grad_(False)
    >>> layout = Layout.of_module(model, personal=["3.*"])
    >>> layout.trained, layout.personal
    (('2.weight', '2.bias'), ('3.weight', '3.bias'))
    >>> sorted(layout.travelling(model.state_dict()))
    ['2.bias', '2.weight']
    """

    trained: tuple[str, ...]
    float_buffers: tuple[str, ...]
    integer_buffers: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    frozen_buffers: tuple[str, ...] = ()
    personal: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, state: State, buffers: Collection[str] | None = None, tied: Mapping[str, str] | None = None) -> Layout:
        """Sort the names of `state` where no module tells what is frozen: all of it travels.

        `buffers` are the buffers' names, where they are known; otherwise batch norms' statistics are told by their
        names, and masks by their values. `tied` are further names of tensors, by which the first is meant.

        Examples
        --------
        >>> Layout.of(nn.BatchNorm1d(2).state_dict()).integer_buffers
        ('num_batches_tracked',)
        """
        tied = tied or {}

        def is_buffer(name: str) -> bool:
            if buffers is not None:
                return name in buffers
            return is_norm_statistic(name) or is_mask(state[name])

        floats = [name for name in state if is_number(state[name])]
        return cls(
            trained=tuple(n for n in floats if n not in tied and not is_buffer(n)),
            float_buffers=tuple(n for n in floats if is_buffer(n)),
            integer_buffers=tuple(n for n in state if not is_number(state[n])),
            tied=tied,
        )

    @classmethod
    def of_module(
        cls,
        module: nn.Module,
        personal: Sequence[str] = (),
        *,
        frozen_mode: FrozenMode = "eval",
        send_frozen: bool = False,
    ) -> Layout:
        """Sort the tensors of `module`, by what it trains (``requires_grad``) and by patterns such as ``"head.*"``.

        With `send_frozen`, what is frozen travels like the rest, for clients that cannot make it themselves.

        Raises
        ------
        InvalidOption
            Nothing is left that travels.
        UnknownName
            A pattern is the name of no tensor; the names that there are stand in the error.
        """
        state, buffers = module_state(module)
        tied, free = tied_names(module), trained_names(module)
        own = matching_names(state, personal, tied, "personal")
        parameters = [name for name in state if name not in buffers]
        frozen = set() if send_frozen else {name for name in parameters if name not in free and name not in own}
        still_buffers: dict[str, bool] = {}
        for name in buffers - own:
            beside = owners(name, parameters)
            if beside and all(n in frozen or n in own for n in beside):
                still_buffers[name] = any(n in own for n in beside)
        if frozen_mode == "train":
            still_buffers = {name: mine for name, mine in still_buffers.items() if mine}
        own |= {name for name, mine in still_buffers.items() if mine}
        moving = [name for name in state if name not in frozen | own | set(still_buffers)]
        layout = cls(
            trained=tuple(n for n in moving if n not in buffers and n not in tied),
            float_buffers=tuple(n for n in moving if n in buffers and is_number(state[n])),
            integer_buffers=tuple(n for n in moving if n in buffers and not is_number(state[n])),
            frozen=tuple(n for n in state if n in frozen),
            frozen_buffers=tuple(n for n in state if n in still_buffers and n not in own),
            personal=tuple(n for n in state if n in own),
            tied=tied,
        )
        if personal and not layout.trained:
            raise InvalidOption(
                f"personal = {list(personal)} leaves nothing that clients train and the server merges: name fewer"
            )
        return layout

    @property
    def parameters(self) -> tuple[str, ...]:
        """What aggregators see: the trained ones."""
        return self.trained

    @cached_property
    def still(self) -> frozenset[str]:
        """All that does not travel."""
        return frozenset((*self.frozen, *self.frozen_buffers, *self.personal))

    @property
    def known(self) -> tuple[str, ...]:
        """What is the same on both sides without being sent."""
        return (*self.frozen, *self.frozen_buffers)

    def travelling(self, state: State) -> dict[str, Tensor]:
        """The part of `state` that is sent."""
        return {name: tensor for name, tensor in state.items() if name not in self.still}

    def completed(self, state: State, own: State) -> dict[str, Tensor]:
        """`state` with all that does not travel from `own`, be it in `state` or not.

        Examples
        --------
        >>> import torch
        >>> layout = Layout(trained=("head",), float_buffers=(), integer_buffers=(), frozen=("body",))
        >>> layout.completed({"head": torch.ones(1)}, {"body": torch.zeros(1), "head": torch.zeros(1)})
        {'body': tensor([0.]), 'head': tensor([1.])}
        """
        return {**{name: own[name] for name in own if name in self.still}, **self.travelling(state)}


def frozen_parts(module: nn.Module) -> list[nn.Module]:
    """The parts of a model that are frozen as a whole, each the largest: what runs as in use while the rest trains.

    None where the model trains nothing: then it has only been made ready for use.

    Examples
    --------
    >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.Dropout()), nn.Dropout(), nn.Linear(3, 2))
    >>> _ = model[0].requires_grad_(False)
    >>> frozen_parts(model) == [model[0]]
    True
    """
    parameters = list(module.parameters())
    if not parameters or any(p.requires_grad for p in parameters):
        return _frozen_below(module)
    return []


def _frozen_below(module: nn.Module) -> list[nn.Module]:
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        return [module]
    return [part for child in module.children() for part in _frozen_below(child)]


def check_patterns(patterns: Iterable[str], what: str = "personal") -> tuple[str, ...]:
    """Patterns of names of tensors as a tuple; `what` is the setting that holds them.

    Raises
    ------
    InvalidOption
        They are no list of texts.
    """
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise InvalidOption(f'{what} must be a list of patterns, such as ["head.*"], got {patterns!r}')
    kept = tuple(patterns)
    if not all(isinstance(pattern, str) and pattern for pattern in kept):
        raise InvalidOption(f'{what} must be a list of patterns, such as ["head.*"], got {list(kept)!r}')
    return kept


def freeze(module: nn.Module, patterns: Sequence[str]) -> nn.Module:
    """`module` itself, its parameters that a pattern such as ``"features.*"`` matches being trained no more.

    Raises
    ------
    UnknownName
        A pattern is the name of no parameter.
    InvalidOption
        Nothing is left to train.

    Examples
    --------
    >>> model = freeze(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), ["0"])
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['1.weight', '1.bias']
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name in matching_names(parameters, patterns, tied_names(module), "frozen"):
        parameters[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise InvalidOption(f"frozen = {list(patterns)} leaves nothing to train: name fewer")
    return module


def matching_names(state: State, patterns: Sequence[str], tied: Mapping[str, str], what: str) -> set[str]:
    """Names that a pattern matches; of a shared tensor all, where it matches one."""
    first: set[str] = set()
    for pattern in patterns:
        either = pattern, f"{pattern}.*"  # a layer's name stands for all that is in it
        names = {
            tied.get(name, name)
            for name in state
            if any(fnmatchcase(name, either_pattern) for either_pattern in either)
        }
        if not names:
            raise UnknownName(f"tensor in {what}", pattern, list(state))
        first |= names
    return {name for name in state if tied.get(name, name) in first}


def owners(buffer: str, parameters: Iterable[str]) -> list[str]:
    """The parameters that a buffer belongs to: of the nearest part around it that has any.

    Examples
    --------
    >>> owners("body.norm.running_mean", ["body.conv.weight", "body.norm.weight", "head.weight"])
    ['body.norm.weight']
    """
    parameters = list(parameters)
    prefix = buffer.rpartition(".")[0]
    while prefix:
        beside = [name for name in parameters if name.startswith(f"{prefix}.")]
        if beside:
            return beside
        prefix = prefix.rpartition(".")[0]
    return parameters


BatchNormPolicy = Literal["mean", "pooled", "recalibrate", "local"]
"""What becomes of batch-norm statistics. ``mean``: weighted mean. ``pooled``: mean and variance of all
clients' activations taken together, within plus between clients. ``recalibrate``: clients measure the
merged model afterwards and the server pools what they find. ``local``: never merged."""


def without_personal(model: nn.Module, layout: Layout | None) -> nn.Module:
    """`model` with what is personal marked as not trained, so that nobody measures, matches or refines it."""
    names = set() if layout is None else set(layout.personal)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    return model
