"""Proof by trial: re-order all neurons at random and compare outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmerge.errors import ModelError
from fedmerge.models.copies import copy_of
from fedmerge.permutations.spec import PermutationSpec
from fedmerge.seeding import torch_generator

__all__ = ["verify"]


def verify(spec: PermutationSpec, model: nn.Module, example: Any, *, tolerance: float = 1e-5, seed: int = 0) -> float:
    """Apply random permutations of every group and compare the model's outputs, in float64 and eval mode.

    Norm statistics and all vectors (biases, scales) are drawn at random first: fresh ones are alike, which hides
    mistakes.

    Returns
    -------
    float
        Largest difference of outputs, relative to how much outputs differ from each other.

    Raises
    ------
    ModelError
        It is above the tolerance; the message names the groups that are to blame.

    Examples
    --------
    >>> from fedmerge.permutations import trace
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> verify(trace(model, torch.zeros(2, 4)), model, torch.zeros(2, 4)) < 1e-5
    True
    """
    arguments = example if isinstance(example, tuple) else (example,)
    generator = torch_generator(seed, "verify")
    module = copy_of(model).eval().cpu()
    arguments = tuple(_drawn(a, generator) for a in arguments)
    state = {name: _varied(name, tensor, generator) for name, tensor in module.state_dict().items()}
    for alias, name in spec.aliases.items():
        state[alias] = state[name]
    module.double()
    wanted = _outputs(module, state, arguments)
    scale = max((_spread(o) for o in wanted), default=0.0) or 1.0

    def error(perms: list[Tensor]) -> float:
        got = _outputs(module, spec.apply(state, perms), arguments)
        worst = max(float((a - b).abs().max()) for a, b in zip(wanted, got, strict=True))
        return worst / scale if math.isfinite(worst) else math.inf

    perms = [_moving(group.size, generator) for group in spec.groups]
    found = error(perms)
    if found <= tolerance:
        return found
    culprits = []
    for i, group in enumerate(spec.groups):
        alone = spec.identity()
        alone[i] = _moving(group.size, generator)
        if error(alone) > tolerance:
            culprits.append(f"{group.name!r} ({', '.join(f'{s.parameter} axis {s.axis}' for s in group.sites)})")
    raise ModelError(
        f"re-ordering neurons changes the outputs of {type(model).__name__} by {found:.1g} of their size: "
        f"wrong are {'; '.join(culprits) or 'only several groups together'}. Remove them from the spec"
    )


def _moving(size: int, generator: torch.Generator) -> Tensor:
    """A random permutation that is not the identity."""
    perm = torch.randperm(size, generator=generator)
    return perm.roll(1) if torch.equal(perm, torch.arange(size)) else perm


def _spread(output: Tensor) -> float:
    """How much outputs differ from each other: a bias that all share would hide what moves."""
    deviation = output - (output.mean(0) if len(output.shape) > 1 and len(output) > 1 else output.mean())
    return float(deviation.abs().max()) or float(output.abs().max())


def _drawn(argument: Any, generator: torch.Generator) -> Any:
    """Floating inputs in float64 with noise, as an example of zeros proves little."""
    if isinstance(argument, Tensor) and argument.is_floating_point():
        own = argument.detach().cpu().double()
        return own + 0.5 * torch.randn(own.shape, generator=generator, dtype=torch.float64)
    return argument.cpu() if isinstance(argument, Tensor) else argument


def _varied(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    own = tensor.detach().double()
    if tensor.ndim > 1:  # some layers start at zero and would hide everything before them
        differs = own.numel() > 0 and bool(own.min() < own.max())
        return own if differs else 0.1 * torch.randn(own.shape, generator=generator, dtype=torch.float64)
    noise = torch.rand(own.shape, generator=generator, dtype=torch.float64)
    return 0.5 + noise if name.endswith("running_var") else own + 0.3 * (noise - 0.5)


def _outputs(module: nn.Module, state: Mapping[str, Tensor], arguments: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        found = functional_call(module, dict(state), arguments, tie_weights=False)
    return [t for t in _leaves(found) if t.is_floating_point()]


def _leaves(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, Mapping):
        return [t for part in found.values() for t in _leaves(part)]
    if isinstance(found, list | tuple):
        return [t for part in found for t in _leaves(part)]
    return []
