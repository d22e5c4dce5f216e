"""What a proof by trial runs: a model in the highest precision that it takes, with a state in which mistakes show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from fedmerge.errors import ModelError
from fedmerge.inputs import arguments_of, changed, tensors_of
from fedmerge.permutations.running import copied, repeated
from fedmerge.state import State

__all__ = ["Trial", "trial"]

_BATCH_NORMS: dict[Any, tuple[str, ...]] = {  # with the names of their positional arguments
    nn.functional.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training"),
}


@dataclass(frozen=True)
class Trial:
    """A model that runs, a state for it and arguments."""

    module: nn.Module
    state: State
    example: Any

    def outputs(self, state: State) -> list[Tensor]:
        """Outputs on the CPU, in float64: those that are floats, or else all; empty ones are left out."""
        outputs = self._run(_cloned(state))
        tensors = [torch.view_as_real(t) if t.is_complex() else t for t in tensors_of(outputs) if t.numel()]
        floats = [t for t in tensors if t.is_floating_point()]
        return [t.double() for t in floats or tensors]

    def calibrated(self, generator: torch.Generator) -> Trial:
        """With statistics of batch norm near those of the example, for with others signals may die out."""
        state = _cloned(self.state)
        with _Calibrating(generator):
            self._run(state)
        return replace(self, state=state)

    def _run(self, state: State) -> Any:
        args, kwargs = arguments_of(self.module, changed(self.example, Tensor.clone))
        repeated()
        with torch.no_grad():
            return functional_call(self.module, dict(state), args, kwargs, tie_weights=False)


def _cloned(state: State) -> dict[str, Tensor]:
    """Some models write into their buffers; what is shared stays shared."""
    copies: dict[int, Tensor] = {}
    return {name: copies.setdefault(id(tensor), tensor.clone()) for name, tensor in state.items()}


def trial(model: nn.Module, example: Any, aliases: Mapping[str, str], generator: torch.Generator) -> Trial:
    """The first that runs and gives numbers, in the best precision and with as much drawn at random as possible.

    Raises
    ------
    ModelError
        None does.
    """
    example = changed(example, lambda tensor: tensor.detach().cpu())
    drawn_example = changed(example, lambda tensor: _with_noise(tensor, generator))
    own = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    drawn = {name: _varied(name, tensor, name in parameters, generator) for name, tensor in own.items()}
    for alias, name in aliases.items():
        drawn[alias], own[alias] = drawn[name], own[name]
    reason: Exception | str = "its outputs are not numbers"
    for dtype in _precisions(own):
        for state, inputs in ((drawn, drawn_example), (drawn, example), (own, example)):
            module = copied(model).cpu()
            if dtype is not None:
                module = module.double() if dtype == torch.float64 else module.float()
            kinds = module.state_dict()
            cast = {id(tensor): tensor.to(kinds[name].dtype) for name, tensor in state.items()}
            tried = Trial(
                module,
                {name: cast[id(tensor)] for name, tensor in state.items()},
                changed(inputs, partial(_cast, dtype)),
            )
            try:
                if state is drawn:
                    tried = tried.calibrated(generator)
                outputs = tried.outputs(tried.state)
            except Exception as error:  # of any kind: another precision, or its own values, may please the model
                reason = error
                continue
            if not any(bool(output.isnan().any()) for output in outputs):
                return tried
    raise ModelError(
        f"{type(model).__name__} cannot be run on the example, so nothing can be proved of it ({reason}): pass one "
        "that it takes in eval mode"
    ) from (reason if isinstance(reason, Exception) else None)


def _precisions(state: State) -> tuple[torch.dtype | None, ...]:
    """float64, float32, and None for the model's own where it is another."""
    own = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    return (torch.float64, torch.float32, *(() if own <= {torch.float32} else (None,)))


def _with_noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Floats with noise, as an example of zeros proves little."""
    if not tensor.is_floating_point():
        return tensor
    noise = 0.5 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return (tensor.double() + noise).to(tensor.dtype)


def _varied(name: str, tensor: Tensor, trained: bool, generator: torch.Generator) -> Tensor:
    """Other values of a tensor that show more."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    own = tensor.double()
    if tensor.ndim > 1:
        if own.min() == own.max():  # some layers start at zero and would hide everything before them
            return 0.1 * torch.randn(own.shape, generator=generator, dtype=torch.float64)
        gain = math.sqrt(2 * len(own) / own.numel()) / float(own.std())
        return own * gain if trained and 1 < gain < math.inf else own  # no signal may die out on its way
    noise = torch.rand(own.shape, generator=generator, dtype=torch.float64)
    return 0.5 + noise if name.endswith("running_var") else own + 0.3 * (noise - 0.5)


class _Calibrating(TorchFunctionMode):
    """Writes what a batch norm is given into its statistics, not quite exactly, before it uses them."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _BATCH_NORMS:
            arguments = {**dict(zip(_BATCH_NORMS[func], args, strict=False)), **kwargs}
            if arguments.get("running_var") is not None and not arguments.get("training", False):
                self._write(arguments["input"], arguments["running_mean"], arguments["running_var"])
        return func(*args, **kwargs)

    def _write(self, x: Tensor, mean: Tensor, variance: Tensor) -> None:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        kept, own = x.var(axes, unbiased=False), x.mean(axes)
        kept = kept.where(kept > 0, torch.ones_like(kept))
        shift, factor = torch.rand(2, len(kept), generator=self._generator, dtype=torch.float64).to(kept.dtype)
        mean.copy_(own + 0.3 * (shift - 0.5) * kept.sqrt())
        variance.copy_(kept * (0.5 + factor))


def _cast(dtype: torch.dtype | None, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
