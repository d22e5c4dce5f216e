"""A pretrained base: tensors of a file, or of a factory, that a model starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from fedmerge.errors import FedMergeError, ModelError, nearest
from fedmerge.layout import matching_names
from fedmerge.lookup.loading import load_named
from fedmerge.models.factory import wanted
from fedmerge.models.state_fit import check_kinds, tied_tensors
from fedmerge.records.model_tensors import digest, read_state, renamed
from fedmerge.state import State, is_extra, is_finite, is_uninitialised, module_state, tied_names

__all__ = ["FILE_ENDINGS", "Pretrained", "is_base_file"]

FILE_ENDINGS = (".safetensors", ".json")
_MOST_TOLD = 3


def is_base_file(source: str) -> bool:
    """Whether a pretrained base is a file, rather than ``module:factory``.

    Examples
    --------
    >>> is_base_file("bases/vit.safetensors"), is_base_file("my_models:base")
    (True, False)
    """
    return source.endswith(FILE_ENDINGS)


@dataclass(frozen=True)
class Pretrained:
    """Where a model's first values come from; small, for it travels to workers.

    Parameters
    ----------
    source
        A safetensors file, the index of one in shards (``model.safetensors.index.json``), a run's checkpoint, or
        ``module:factory``: a function that returns a module or a state dict. The function is given ``input_shape`` and
        ``num_classes`` where it has parameters of these names.
    digest
        SHA-256 of the file, which must not have changed; empty for a factory.
    prefix
        Pairs of an old and a new beginning of names, see :func:`~fedmerge.records.model_tensors.renamed`.
    leave
        Patterns of tensors that stay as initialised, such as ``"head.*"``; what the base has of that name is not used.

    Examples
    --------
    >>> import tempfile
    >>> from fedmerge.records.atomic_files import write_tensors
    >>> file = Path(tempfile.mkdtemp()) / "base.safetensors"
    >>> write_tensors(file, nn.Linear(3, 2).state_dict())
    >>> base = Pretrained(str(file), leave=("bias",))
    >>> model = base.put_into(nn.Linear(3, 2), (3,), 2)
    """

    source: str
    digest: str = ""
    prefix: tuple[tuple[str, str], ...] = ()
    leave: tuple[str, ...] = ()

    def put_into(self, module: nn.Module, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """`module` itself, with the base's values.

        Raises
        ------
        ModelError
            The base cannot be read or has changed, or its names or shapes do not fit the model.
        UnknownName
            A prefix or a pattern fits no name.
        """
        if is_base_file(self.source):
            state: State = _file_state(self.source, self.digest)
        else:
            state = _factory_state(self.source, input_shape, num_classes)
        state = renamed(state, dict(self.prefix), self.source)
        targets = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        with torch.no_grad():
            for name, tensor in fitting_tensors(module, state, self.leave, self.source).items():
                targets[name].copy_(tensor)
        return module


# A process works on one experiment at a time, and makes its model often.
@lru_cache(maxsize=1)
def _file_state(source: str, known: str) -> State:
    file = Path(source)
    if known and digest(file) != known:
        raise ModelError(f"{source} has changed since this run was set up: put the old file back, or begin a new run")
    return read_state(file)


def _factory_state(name: str, input_shape: tuple[int, ...], num_classes: int) -> State:
    factory = load_named(name, "pretrained base", "factory", "my_models:base", ModelError)
    if not callable(factory):
        raise ModelError(f"pretrained base {name!r} is a {type(factory).__name__}: name a function that returns one")
    try:
        with torch.random.fork_rng(devices=[]):
            made = factory(**wanted(factory, input_shape, num_classes))
    except FedMergeError:
        raise
    except Exception as error:  # a person's own factory may raise anything
        raise ModelError(f"pretrained base {name!r}: its factory fails ({type(error).__name__}: {error})") from error
    if isinstance(made, nn.Module):
        return module_state(made)[0]
    if not isinstance(made, Mapping) or not all(isinstance(tensor, Tensor) for tensor in made.values()) or not made:
        raise ModelError(
            f"pretrained base {name!r}: its factory returned a {type(made).__name__}: return a torch.nn.Module, or a "
            "state dict of tensors by name"
        )
    return dict(made)


def fitting_tensors(module: nn.Module, state: State, leave: Sequence[str], where: str) -> dict[str, Tensor]:
    """The tensors of `state` that the model takes over, tied ones under all of their names.

    Raises
    ------
    ModelError
        Names, shapes or types do not fit, tensors hold NaN or infinite values, or none is left.
    UnknownName
        A pattern fits no name.
    """
    own = module_state(module)[0]
    lazy = [name for name, tensor in own.items() if is_uninitialised(tensor)]
    if lazy:
        raise ModelError(f"{where}: {lazy[0]!r} of the model belongs to a lazy layer: give the layer its input size")
    state = {name: tensor for name, tensor in state.items() if not is_extra(name)}
    left = matching_names({**state, **own}, leave, tied_names(module), "pretrained_except")
    state = {name: tensor for name, tensor in state.items() if name not in left}
    state |= {name: tensor for name, tensor in tied_tensors(where, module, state).items() if name not in left}
    _check_names([n for n in own if n not in state and n not in left], [n for n in state if n not in own], state, where)
    _check_shapes(own, state, where)
    check_kinds(where, module, state)
    bad = [name for name, tensor in state.items() if not is_finite(tensor)]
    if bad:
        raise ModelError(f"{where}: {bad[0]!r} holds NaN or infinite values: no model can start from it")
    if not state:
        raise ModelError(f"{where}: pretrained_except = {list(leave)} leaves nothing to start from: name fewer")
    return state


def _check_names(missing: list[str], beyond: list[str], state: State, where: str) -> None:
    """Names that only one of the two has, each with what it may be called in the other."""
    problems = []
    for name in missing[:_MOST_TOLD]:
        near = _nearest(name, beyond or list(state))
        problems.append(f"it lacks {name!r}{f', nearest is {near!r}' if near else ''}")
    for name in beyond[:_MOST_TOLD] if not missing else ():
        problems.append(f"the model has no {name!r}")
    if problems:
        more = max(len(missing), len(beyond) if not missing else 0) - len(problems)
        pattern = _part_of((missing or beyond)[0])
        raise ModelError(
            f"{where} does not fit the model: {'; '.join(problems)}{f'; and {more} more' if more > 0 else ''}. "
            f"{_prefix_hint(missing, beyond)}Choose the model that it belongs to, map beginnings of names with "
            f'model.prefix, or leave a part out with model.pretrained_except = ["{pattern}"]'
        )


def _nearest(name: str, known: list[str]) -> str | None:
    """The same name with another beginning, or else the one that is spelt most alike."""
    same_end = [other for other in known if other.endswith(f".{name}") or name.endswith(f".{other}")]
    return same_end[0] if same_end else nearest(name, known)


def _prefix_hint(missing: list[str], beyond: list[str]) -> str:
    """The mapping that would make all names fit, where one beginning is all that differs."""
    if not missing or len(missing) != len(beyond):
        return ""
    for longer, shorter, way in ((beyond, missing, "drop"), (missing, beyond, "add")):
        fronts = {name.removesuffix(shorter[0]) for name in longer if name.endswith(f".{shorter[0]}")}
        for front in fronts:
            if {front + name for name in shorter} == set(longer):
                old, new = (front, "") if way == "drop" else ("", front)
                return f'model.prefix = {{"{old}" = "{new}"}} makes the names fit. '
    return ""


def _check_shapes(own: State, state: State, where: str) -> None:
    wrong = [name for name, tensor in state.items() if tensor.shape != own[name].shape]
    if wrong:
        problems = [f"{n!r} is {list(state[n].shape)}, in the model {list(own[n].shape)}" for n in wrong[:_MOST_TOLD]]
        more = f"; and {len(wrong) - _MOST_TOLD} more" if len(wrong) > _MOST_TOLD else ""
        raise ModelError(
            f"{where} does not fit the model: {'; '.join(problems)}{more}. Give the model the widths of the base "
            "(model.options), or leave such parts as they are initialised: "
            f'model.pretrained_except = ["{_part_of(wrong[0])}"]'
        )


def _part_of(name: str) -> str:
    """The pattern of the layer that a tensor belongs to."""
    layer = name.rpartition(".")[0]
    return f"{layer}.*" if layer else name
