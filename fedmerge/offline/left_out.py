"""Merging a part of a model: the rest is left out, and comes from one of the models as it is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fedmerge.errors import InvalidOption, ModelError, shown
from fedmerge.layout import Layout, check_patterns, matching_names, owners
from fedmerge.models.resize import resize
from fedmerge.state import State, module_state, tied_names

__all__ = ["LeftOut", "layout_without", "with_part", "with_tensors", "without_names"]


@dataclass(frozen=True)
class LeftOut:
    """Which tensors of models at hand are not merged, and whose they are in the result.

    Parameters
    ----------
    only
        Patterns of tensors that are merged; None for all.
    leave_out
        Patterns of tensors that are not, even if `only` names them.
    left_from
        ``"first"``, the first model, or ``"base"``.

    Examples
    --------
    >>> body = {"body.weight": 0, "body.mean": 0, "head.weight": 0}
    >>> sorted(LeftOut(only=("body",)).names(body, {"body.mean"}, {}))
    ['head.weight']
    """

    only: tuple[str, ...] | None = None
    leave_out: tuple[str, ...] = ()
    left_from: str = "first"

    @classmethod
    def of(cls, only: Any, leave_out: Any, left_from: Any, *, with_base: bool) -> LeftOut:
        """Check what a person has given.

        Raises
        ------
        InvalidOption
            Something is no list of patterns, or the rest is to come from a base that is not given.
        """
        patterns = None if only is None else check_patterns(only, "only")
        if patterns == ():
            raise InvalidOption('only = [] merges nothing: name patterns, such as only=["encoder.*"], or leave it out')
        if left_from not in ("first", "base"):
            raise InvalidOption(f'left_from must be "first" or "base", got {shown(left_from)}')
        if left_from == "base" and not with_base:
            raise InvalidOption('left_from = "base" takes what is left out from the base: pass base=')
        left_out = cls(patterns, check_patterns(() if leave_out is None else leave_out, "leave_out"), left_from)
        if left_from == "base" and not left_out:
            raise InvalidOption('left_from = "base" wants to know what is left out: pass only= or leave_out=')
        return left_out

    def __bool__(self) -> bool:
        return self.only is not None or bool(self.leave_out)

    def names(self, state: Mapping[str, Any], buffers: Iterable[str], tied: Mapping[str, str]) -> frozenset[str]:
        """Names of what is left out; a buffer that no pattern names goes with the parameters that it belongs to.

        Where they part, it is not among what `only` names, nor among what `leave_out` names.

        Raises
        ------
        UnknownName
            A pattern is the name of no tensor.
        InvalidOption
            Nothing is left to merge.
        """
        out = matching_names(state, self.leave_out, tied, "leave_out")
        if self.only is None:
            named, kept = set(out), set(state) - out
        else:
            named = matching_names(state, self.only, tied, "only")
            kept = named - out
            named |= out
        buffers = set(buffers) & set(state)
        parameters = [name for name in state if name not in buffers]
        left = {name for name in parameters if name not in kept}
        for name in buffers:
            beside = [owner in left for owner in owners(name, parameters)]
            if name in named or not beside:
                out_too = name not in kept
            else:  # a buffer of the whole model goes along with what is the rule, not with what is named
                out_too = all(beside) if self.only is None else any(beside)
            if out_too:
                left.add(name)
        if parameters and left.issuperset(parameters):
            settings_text = f"only = {list(self.only or ())}, leave_out = {list(self.leave_out)}"
            raise InvalidOption(f"{settings_text} leaves nothing to merge: leave out less")
        return frozenset(left)


def without_names(statistics: State, names: Iterable[str]) -> dict[str, Tensor]:
    """A statistic without the entries of some parameters, which bear their names, or names below them.

    Examples
    --------
    >>> sorted(without_names({"head.weight": 0, "head.weight.inputs": 0, "body.weight": 0}, ["head.weight"]))
    ['body.weight']
    """
    gone = tuple(names)
    below = tuple(f"{name}." for name in gone)
    return {key: value for key, value in statistics.items() if key not in gone and not key.startswith(below)}


def with_tensors(state: State, own: State, names: Collection[str]) -> dict[str, Tensor]:
    """A state with another's tensors in the place of those of some names.

    Examples
    --------
    >>> with_tensors({"body": 0, "head": 0}, {"outputs": 1}, {"head", "outputs"})
    {'body': 0, 'outputs': 1}
    """
    return {**{name: tensor for name, tensor in state.items() if name not in names}, **own}


def layout_without(state: State, buffers: frozenset[str], tied: Mapping[str, str], left: frozenset[str]) -> Layout:
    """The tensors of a model sorted by what is merged: what is left out counts as frozen."""
    whole = Layout.of(state, buffers, tied)
    return Layout(
        trained=tuple(n for n in whole.trained if n not in left),
        float_buffers=tuple(n for n in whole.float_buffers if n not in left),
        integer_buffers=tuple(n for n in whole.integer_buffers if n not in left),
        frozen=tuple(n for n in state if n in left and n not in buffers),
        frozen_buffers=tuple(n for n in state if n in left and n in buffers),
        tied=tied,
    )


def with_part(merged: nn.Module, model: nn.Module, patterns: Sequence[str]) -> nn.Module:
    """A copy of `model` with all tensors of `merged` but for a part, such as the model's own head.

    Parameters
    ----------
    merged
        What :func:`fedmerge.merge` made of several models; its part of these names is not used.
    model
        One of those models. Its part may have other shapes, or other layers, than the merged model's.
    patterns
        Of the tensors that stay the model's own, such as ``["head.*"]``; a layer's name stands for all that is in it.

    Returns
    -------
    nn.Module
        A new module; neither of the two is modified.

    Raises
    ------
    UnknownName
        A pattern is the name of no tensor.
    ModelError
        The two do not have the same tensors besides that part.

    Examples
    --------
    >>> import torch
    >>> a = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> b = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> import fedmerge
    >>> body = fedmerge.merge([a, b], leave_out=["2"])
    >>> with_part(body, b, ["2"])(torch.zeros(1, 4)).shape
    torch.Size([1, 3])
    """
    own, shared = module_state(model)[0], module_state(merged)[0]
    named = matching_names({**shared, **own}, check_patterns(patterns, "patterns"), tied_names(model), "patterns")
    kept = named & set(own)
    missing = [name for name in own if name not in kept and name not in shared]
    if missing:
        raise ModelError(
            f"the merged model has no {missing[0]!r}, and model has: let the patterns name all in which the two differ"
        )
    beyond = [name for name in shared if name not in own and name not in named]
    if beyond:
        raise ModelError(
            f"model has no {beyond[0]!r}, and the merged model has: let the patterns name all in which the two differ"
        )
    return resize(model, {name: own[name] if name in kept else shared[name].to(own[name]) for name in own})
