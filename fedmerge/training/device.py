"""Which device to compute on."""

from __future__ import annotations

import torch

from fedmerge.errors import ConfigError

__all__ = ["choose_device"]


def choose_device(name: str) -> torch.device:
    """The device called `name`; ``"auto"`` is a GPU where this process has one, or else the CPU.

    Raises
    ------
    ConfigError
        There is no such device here.

    Examples
    --------
    >>> choose_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if str(name).startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"device {name!r} cannot be used: torch finds no GPU here. Choose auto or cpu") from error
        reason = str(error).partition("\n")[0]
        if reason.startswith("Expected one of"):  # and twenty names that nobody has
            reason = "torch knows no such device"
        raise ConfigError(f"device {name!r} cannot be used here ({reason}): choose auto, cpu or cuda") from error
    return device
