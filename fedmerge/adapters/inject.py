"""Adapters into a model and out of it: :func:`lora` puts them beside its layers, :func:`fold` adds them to weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from fedmerge.adapters.lora_layers import LoraLayer, wrapped
from fedmerge.adapters.low_rank_pairs import Pair, find_pairs
from fedmerge.adapters.scalings import pair_scaling, scaling_of
from fedmerge.errors import AdapterError, InvalidOption, UnknownName
from fedmerge.layout import check_patterns, matching_names
from fedmerge.models.resize import copy_of
from fedmerge.seeding import integer_seed
from fedmerge.state import State, accumulator_dtype, module_state, tied_names

__all__ = ["fold", "folded_state", "lora"]

_KINDS = (nn.Linear, nn.Conv2d, nn.Embedding)


def lora(
    model: nn.Module,
    rank: int = 4,
    alpha: float = 8.0,
    targets: Sequence[str] = ("*",),
    *,
    train: Sequence[str] = (),
    rank_stabilized: bool = False,
    seed: int = 0,
) -> nn.Module:
    """A copy of `model` whose chosen layers have low-rank adapters, and which trains nothing else.

    Hu et al. 2021 (arXiv:2106.09685). Tensors have peft's names: the weights of ``fc`` become ``fc.base_layer.weight``,
    ``fc.lora_A.default.weight`` and ``fc.lora_B.default.weight``. Until it is trained, the copy gives the same outputs.

    Parameters
    ----------
    model
        The base; it is left as it is.
    rank, alpha
        r, and the numerator of the scaling: updates are ``alpha / r * B A``.
    targets
        Which linear layers, two-dimensional convolutions and embeddings get one: patterns of their names, such as
        ``"*attention*"``, or the ends of names, as peft takes them (``"q_proj"``). ``"*"`` takes all of them, but for
        convolutions with groups.
    train
        Patterns of parameters that are trained besides, as they are: a new head (``"head"``).
    rank_stabilized
        Whether updates are ``alpha / sqrt(r) * B A``.
    seed
        Of the first values of A: the same in the whole federation, or methods that keep A frozen are wrong.

    Returns
    -------
    nn.Module
        A new module.

    Raises
    ------
    InvalidOption
        A rank, an alpha or the targets are none.
    UnknownName
        A target is the name of no layer, or `train` of no parameter.
    AdapterError
        A layer that was named cannot have an adapter, or one is there already.

    Examples
    --------
    >>> base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> model = lora(base, rank=2, targets=["0"], train=["2"])
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.lora_A.default.weight', '0.lora_B.default.weight', '2.weight', '2.bias']
    """
    scaling, patterns = pair_scaling(rank, alpha, rank_stabilized), check_patterns(targets, "targets")
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise AdapterError("the model has adapters already: fold them first, fedmerge.adapters.fold(model)")
    made, known = copy_of(model), [name for name, part in model.named_modules() if type(part) in _KINDS]
    named: set[str] = set()
    for pattern in patterns:
        fits = {name for name in known if fnmatchcase(name, pattern) or name.endswith(f".{pattern}")}
        if not fits and not (pattern == "*" and known == [""]):
            raise UnknownName("layer in targets", pattern, known)
        named |= fits
    own = matching_names(dict(made.named_parameters()), train, tied_names(made), "train") if train else set()
    layers = [name for name in known if name in named and f"{name}.weight" not in own]
    made.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(integer_seed(seed, "adapters"))
        for name in layers:
            # A star takes what can have an adapter; who names a layer wants to know that it cannot.
            if getattr(made.get_submodule(name), "groups", 1) != 1 and "*" in patterns:
                continue
            made = _replaced(made, name, rank, scaling)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in own)
    if not any(isinstance(module, LoraLayer) for module in made.modules()):
        raise InvalidOption(f"targets = {list(patterns)} leaves no layer to put an adapter beside: name more")
    return made


def fold(model: nn.Module) -> nn.Module:
    """A copy of a model of :func:`lora` without adapters, their updates added to the weights: the outputs are the same.

    All parameters of it are trained, as those of a fresh model are.

    Raises
    ------
    AdapterError
        There is no adapter in it.

    Examples
    --------
    >>> base = nn.Sequential(nn.Linear(4, 2))
    >>> torch.equal(fold(lora(base, rank=1))[0].weight, base[0].weight)
    True
    """
    made = copy_of(model)
    layers = [name for name, part in made.named_modules() if isinstance(part, LoraLayer)]
    if not layers:
        raise AdapterError("the model has no adapter of fedmerge.adapters.lora to fold; peft has merge_and_unload()")
    folded = folded_state(module_state(made)[0], {p.a: scaling_of(made, p) or 1.0 for p in _pairs(made)})
    for name in layers:
        layer = made.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        plain = layer.base_layer
        with torch.no_grad():
            plain.weight.copy_(folded[f"{name}.base_layer.weight" if name else "base_layer.weight"])  # type: ignore[operator]
        made = _set(made, name, plain)
    return made.requires_grad_(True)


def folded_state(
    state: State, scalings: Mapping[str, float], pairs: Sequence[Pair] | None = None
) -> dict[str, torch.Tensor]:
    """A state whose pairs are added to the weights of their layers and taken out.

    Parameters
    ----------
    state
        All tensors, those of the base among them.
    scalings
        By names of A, what ``B A`` is multiplied by.
    pairs
        Which pairs; all that :func:`~fedmerge.adapters.find_pairs` finds where not given.

    Raises
    ------
    AdapterError
        The weight of a layer is not there, or not of the update's shape; or a scaling is not known.
    """
    result = dict(state)
    for pair in find_pairs(state) if pairs is None else pairs:
        weight = pair.weight(state)
        if weight is None:
            raise AdapterError(
                f"{pair.a!r} and {pair.b!r}: the weight of layer {pair.layer!r} is not among the tensors"
            )
        if pair.a not in scalings:
            raise AdapterError(f"{pair.a!r}: nobody tells the scaling of this pair, alpha / r")
        update = pair.update(state, scalings[pair.a])
        if update.shape != state[weight].shape:
            raise AdapterError(
                f"{weight!r} is {list(state[weight].shape)}, and its low-rank update {list(update.shape)}"
            )
        before = result[weight]
        result[weight] = (before.to(accumulator_dtype(before.dtype)) + update).to(before.dtype)
        del result[pair.a], result[pair.b]
    return result


def _pairs(model: nn.Module) -> tuple[Pair, ...]:
    return find_pairs(module_state(model)[0])


def _replaced(model: nn.Module, name: str, rank: int, scaling: float) -> nn.Module:
    layer = model.get_submodule(name)
    try:
        made = wrapped(layer, rank, scaling)
    except AdapterError as error:
        raise AdapterError(f"layer {name!r}: {error}") from error
    if made is None:
        raise AdapterError(
            f"layer {name!r} is a {type(layer).__name__}, beside which fedmerge.adapters.lora puts no adapter: name "
            "linear layers, two-dimensional convolutions and embeddings of torch.nn"
        )
    return _set(model, name, made.train(layer.training))


def _set(model: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """`model` with another part in the place of one; the part itself where it was the whole."""
    if not name:
        return part
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)
    return model
