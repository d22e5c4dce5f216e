"""Whether the model that a client is sent goes with its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmerge.data.example_sets import Examples
from fedmerge.errors import ModelError
from fedmerge.inputs import call
from fedmerge.models.resize import copy_of

__all__ = ["check_outputs"]


@torch.no_grad()
def check_outputs(model: nn.Module, usual: nn.Module, data: Examples) -> None:
    """Make sure that a model of other widths than the client's own takes its inputs, and has as many outputs.

    Parameters
    ----------
    model
        As it was sent.
    usual
        What ``model_fn`` makes.
    data
        The client's examples.

    Raises
    ------
    ModelError
        It does not; the tensors that differ are named.
    """
    known = {name: list(tensor.shape) for name, tensor in usual.state_dict().items()}
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    other = [name for name, shape in own.items() if shape != known[name]]
    if not other or not len(data):
        return
    shapes = ", ".join(f"{name!r} {own[name]} (here {known[name]})" for name in other[:4])
    told = f"the model sent is not the one that model_fn makes: {shapes}"
    one, _ = data.first(1) or (None, None)
    try:
        found, wanted = (call(copy_of(module).eval(), one) for module in (model, usual))
    except (IndexError, RuntimeError, ValueError) as error:
        raise ModelError(f"{told}; it cannot take this client's examples: {error}") from error
    if isinstance(found, Tensor) and isinstance(wanted, Tensor) and found.shape[1:] != wanted.shape[1:]:
        raise ModelError(
            f"{told}; its outputs are {list(found.shape[1:])} and not {list(wanted.shape[1:])}. "
            "Send a model with the clients' head, or have model_fn make this one"
        )
