"""Models that a person hands over to be merged: what they are, what they share, what cannot be merged."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.checks.mergeable import check_codes, check_mergeable, check_pruned
from fedmerge.checks.tensor_checks import equal_in_all, same
from fedmerge.errors import BadArgument, InvalidOption, ModelError, shown
from fedmerge.layout import owners
from fedmerge.models.resize import copy_of, resize
from fedmerge.offline.left_out import LeftOut
from fedmerge.offline.loaders import few
from fedmerge.offline.outputs import with_one_output
from fedmerge.state import frozen_names, is_uninitialised, module_state, tied_names
from fedmerge.tasks import Task, called_as_told

__all__ = ["AtHand", "check_base_widths", "plain_module", "plain_modules"]

_WRAPPED = ("_orig_mod", "module")  # of torch.compile, and of DataParallel


@dataclass(frozen=True)
class AtHand:
    """Models as they were given, out of their wrappers, and what is known of their tensors.

    Parameters
    ----------
    models
        Ready to be copied; none is changed.
    states
        Their tensors, on the device of the first.
    buffers
        Names of tensors that are buffers.
    frozen
        Names of parameters that none of them trains and that are equal in all, with the buffers of their parts.
    tied
        By further names of shared parameters, their first.
    base
        Tensors of the model that all started from, where it is given.
    left
        Names of tensors that are left out of the merge, in any of the models, all of them in `frozen` too: `states` and
        `base` have those of the result.
    apart
        One of them that is not the same in all models, if any is.
    """

    models: tuple[nn.Module, ...]
    states: tuple[dict[str, Tensor], ...]
    buffers: frozenset[str]
    frozen: frozenset[str]
    tied: Mapping[str, str]
    base: dict[str, Tensor] | None = None
    left: frozenset[str] = frozenset()
    apart: str | None = None

    @classmethod
    def of(cls, models: Sequence[nn.Module], base: Any = None, part: LeftOut | None = None) -> AtHand:
        """Look at models, and at the one that all started from.

        Raises
        ------
        ModelError
            One holds what cannot be merged, or ties tensors that differ in another; the base lacks some.
        """
        plain = [_copyable(model) for model in models]
        own_states = [module_state(model) for model in plain]
        for i, (state, _) in enumerate(own_states):
            check_mergeable(f"models[{i}]", state)
        plain = [_beside(model, plain[0]) for model in plain]
        states = [_placed(state, own_states[0][0]) for state, _ in own_states]
        tied = tied_names(plain[0])
        start = None if base is None else _placed(_base_state(base), states[0])
        left, apart = frozenset[str](), None
        if part:
            buffers = frozenset[str]().union(*(names for _, names in own_states))
            known = {**states[0], **{n: t for state in states for n, t in state.items() if n not in states[0]}}
            left = part.names(known, buffers, tied)
            source = start if start is not None and part.left_from == "base" else states[0]
            lacking = sorted((left & set(states[0])) - set(source))
            if lacking:
                raise InvalidOption(f'left_from = "base", and the base has no {lacking[0]!r}: take left_from="first"')
            apart = next((n for n in sorted(left) if not _in_all(states, n)), None)
            states = [_replaced(state, source, left) for state in states]
            start = None if start is None else _replaced(start, source, left)
        if start is not None:
            _check_base(start, states[0], {*left, *own_states[0][1]})
        frozen = equal_in_all(states, frozenset.intersection(*map(frozen_names, plain)))
        parameters = [name for name in states[0] if name not in own_states[0][1]]
        still = {name for name in own_states[0][1] if frozen.issuperset(owners(name, parameters) or [name])}
        _check_ties(states, tied)
        check_codes(states, {name for name, _ in plain[0].named_parameters(remove_duplicate=False)})
        check_pruned(states)
        frozen |= equal_in_all(states, still) | left
        named = frozenset(states[0])
        return cls(tuple(plain), tuple(states), own_states[0][1] & named, frozen, tied, start, left, apart)

    def measured(self, inputs: Any, task: Task | None = None) -> tuple[nn.Module, ...]:
        """The models as they are measured on batches such as `inputs`.

        With their parameters marked as trained but for those that are frozen, called with one argument as the task
        says, and with one tensor as their output.
        """
        called = (called_as_told(self._marked(model), task, inputs) for model in self.models)
        return tuple(with_one_output(model, few(inputs)) for model in called)

    def made(self) -> nn.Module:
        """A module for whoever has to know the model: a copy of the first, with what the result has left out."""
        if not self.left:
            return copy_of(self.models[0])
        first = self.models[0]
        own = module_state(first)[0]
        return self._marked(resize(first, {**own, **{n: t for n, t in self.states[0].items() if n in self.left}}))

    def _marked(self, model: nn.Module) -> nn.Module:
        named = [(n, p) for n, p in model.named_parameters() if p.is_floating_point() or p.is_complex()]
        if all(parameter.requires_grad != (name in self.frozen) for name, parameter in named):
            return model
        copied = copy_of(model)
        for name, parameter in copied.named_parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(name not in self.frozen)
        return copied


def plain_modules(models: Any) -> list[nn.Module]:
    """A list of modules, whatever holds them, each out of what wraps it for compiling or for several devices.

    Raises
    ------
    InvalidOption
        There is none, or something is no module.

    Examples
    --------
    >>> plain_modules(nn.DataParallel(nn.Linear(2, 1)) for _ in range(2))[0]
    Linear(in_features=2, out_features=1, bias=True)
    """
    if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
        raise InvalidOption(f"models is one {type(models).__name__}: pass a list of two or more, as in merge([a, b])")
    if isinstance(models, Mapping):
        raise InvalidOption("models is a mapping: pass a list of modules, such as list(models.values())")
    if isinstance(models, str | bytes) or not isinstance(models, Iterable):
        raise InvalidOption(f"models must be a list of modules, got {_called(models)}")
    try:
        modules = [_unwrapped(model) for model in models]
    except Exception as error:  # what a person iterates over may raise anything
        raise InvalidOption(f"models cannot be read as a list: {type(error).__name__}: {error}") from error
    if not modules:
        raise InvalidOption("there is no model to merge: pass at least one")
    for i, model in enumerate(modules):
        if not isinstance(model, nn.Module):
            raise InvalidOption(f"models[{i}] must be a module, got {_called(model)}")
    return modules


def _base_state(base: Any) -> dict[str, Tensor]:
    unwrapped = _unwrapped(base)
    if not isinstance(unwrapped, nn.Module) or isinstance(unwrapped, nn.ModuleList):
        raise InvalidOption(f"base must be the module that all models started from, got {_called(base)}")
    state = module_state(unwrapped)[0]
    check_mergeable("base", state)
    return state


def _check_base(state: Mapping[str, Tensor], like: Mapping[str, Tensor], unmerged: Container[str]) -> None:
    if set(state) != set(like):
        other = sorted(set(state) ^ set(like))[0]
        where = "the models have" if other in like else "it has"
        lacks = "is missing in it" if other in like else "the models do not have"
        raise BadArgument(
            "base", 0, f"tensor {other!r}, which {where}, {lacks}",
            "base is the model that all started from: the same layers.",
        )  # fmt: skip
    for name, tensor in state.items():
        bad = 0 if name in unmerged else int((~tensor.isfinite()).sum())
        if bad:
            raise ModelError(
                f"base: tensor {name!r} has {bad} of {tensor.numel()} entries NaN or infinite: "
                "pass the model that all started from, as it was before training"
            )


def check_base_widths(base: Mapping[str, Tensor] | None, states: Sequence[Mapping[str, Tensor]]) -> None:
    """Make sure that at least one of the models has the shapes of the base; of others it tells which is the odd one.

    Raises
    ------
    BadArgument
        None has.
    """
    if base is None:
        return
    odd = [[n for n, tensor in state.items() if n in base and base[n].shape != tensor.shape] for state in states]
    if all(odd):
        name, first = odd[0][0], states[0]
        raise BadArgument(
            "base", 0, f"tensor {name!r} has shape {list(base[name].shape)}, in models[0] {list(first[name].shape)}",
            "base is the model that all started from, of the same widths.",
        )  # fmt: skip


def _in_all(states: Sequence[Mapping[str, Tensor]], name: str) -> bool:
    """Whether a tensor is in all models, and the same."""
    first = states[0].get(name)
    return first is not None and all(name in state and same(state[name], first) for state in states)


def _replaced(state: Mapping[str, Tensor], source: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
    """The state with tensors of these names as they are in another, and none that are not there."""
    placed = {name: source.get(name, tensor) if name in names else tensor for name, tensor in state.items()}
    kept = {name: tensor for name, tensor in placed.items() if name not in names or name in source}
    return {**kept, **{name: tensor for name, tensor in source.items() if name in names}}  # in the model's order


def plain_module(model: Any, name: str) -> nn.Module:
    """A module that can be measured, out of what wraps it.

    Raises
    ------
    InvalidOption
        It is none.
    ModelError
        It has tensors without values.
    """
    unwrapped = _unwrapped(model)
    if not isinstance(unwrapped, nn.Module):
        raise InvalidOption(f"{name} must be a module, got {_called(model)}")
    check_mergeable(name, module_state(unwrapped)[0])
    return _copyable(unwrapped)


def _called(value: Any) -> str:
    """What a person has given instead of a module, and what to do about it."""
    if isinstance(value, Mapping):
        return "a mapping: if it is a state_dict, load it into a module first, as in model.load_state_dict(state)"
    if isinstance(value, str | bytes) or hasattr(value, "__fspath__"):
        return (
            f"{str(value)[:80]!r}: load the file into a module, or call fedmerge.offline.merge_files.merge_files([...])"
        )
    if isinstance(value, type):
        return f"the class {value.__name__}: make a module of it and load its weights"
    return "a tensor" if isinstance(value, Tensor) else shown(value, 60)


def _unwrapped(model: Any) -> Any:
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | torch._dynamo.OptimizedModule):
        model = next(getattr(model, name) for name in _WRAPPED if name in model._modules)
    return model


def _copyable(model: nn.Module) -> nn.Module:
    """The model, or a copy without what keeps Python from copying it, or from writing into it.

    Old weight norm and pruning leave a computed tensor at the module, which is made anew in each forward pass;
    a parameter may be one number seen many times over (``expand``).
    """
    held = [tensor for module in model.modules() for tensor in vars(module).values() if isinstance(tensor, Tensor)]
    expanded = [name for name, parameter in model.named_parameters() if _overlaps(parameter)]
    if not expanded and all(tensor.grad_fn is None for tensor in held):
        return model
    copied = copy_of(model)
    own = dict(copied.named_parameters())
    for name in expanded:
        own[name].data = own[name].data.contiguous()
    return copied


def _overlaps(tensor: Tensor) -> bool:
    dense = not is_uninitialised(tensor) and tensor.layout == torch.strided
    return dense and any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _beside(model: nn.Module, first: nn.Module) -> nn.Module:
    """The model, or a copy on the device of the first one's parameters, where it is on another."""
    own, wanted = (next((p.device for p in module.parameters()), None) for module in (model, first))
    return model if wanted is None or own == wanted else copy_of(model).to(wanted)


def _placed(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(like[name].device) if name in like else tensor for name, tensor in state.items()}


def _check_ties(states: Sequence[Mapping[str, Tensor]], tied: Mapping[str, str]) -> None:
    for i, state in enumerate(states):
        for alias, name in tied.items():
            if alias in state and name in state and not same(state[alias], state[name]):
                raise ModelError(
                    f"{name!r} and {alias!r} are one tensor in models[0], and differ in models[{i}]: cut the tie in "
                    "all models first (give each an nn.Parameter of its own), or tie it in all"
                )
