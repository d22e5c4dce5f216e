"""Which buffers hold a number for each neuron, so that they move with them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["moving_buffers"]


def moving_buffers(model: nn.Module) -> set[str]:
    """Names of buffers that belong to neurons as parameters do: of frozen batch norms, and of spectral norms.

    All other buffers are constants, such as frequencies and masks: what meets them has an order.

    Examples
    --------
    >>> layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    >>> sorted(moving_buffers(layer))
    ['parametrizations.weight.0._u', 'parametrizations.weight.0._v']
    """
    return {f"{path}.{name}" if path else name for path, module in model.named_modules() for name in _of(module)}


def _of(module: nn.Module) -> Iterator[str]:
    own = {name for name, buffer in module.named_buffers(recurse=False) if buffer.ndim == 1}
    if own >= {"running_mean", "running_var"}:
        yield from own
    if type(module).__name__ == "_SpectralNorm":  # torch.nn.utils.parametrizations
        yield from own & {"_u", "_v"}
    for hook in module._forward_pre_hooks.values():
        if type(hook).__name__ == "SpectralNorm":  # torch.nn.utils.spectral_norm
            yield from own & {f"{vars(hook)['name']}_{side}" for side in "uv"}
