"""Which models are linear layers with activations between them, so that their gradient can be written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.models.logistic import Logistic
from fedmerge.models.mlp import MLP
from fedmerge.training.linear_stack import Layer, backward, product

__all__ = ["linear_layers"]

_MODULES = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}

# Architectures whose gradient by hand was found to be autograd's.
_verified: set[tuple[object, ...]] = set()


def linear_layers(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Layer, ...] | None:
    """The layers of a model that is nothing but linear layers and activations, else None.

    Known are `fedmerge.models.MLP`, `Logistic`, ``nn.Linear``, and ``nn.Sequential`` of ``Flatten``, ``Linear``,
    ``ReLU``, ``Tanh``, ``Sigmoid``. What was read from the structure is compared with autograd on two examples,
    once for each architecture.

    Parameters
    ----------
    model
        Any model; subclasses, hooks, parametrisations and shared weights make it none of these.
    x, y
        One client's examples.

    Examples
    --------
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.ReLU())
    >>> linear_layers(net, torch.zeros(1, 3), torch.tensor([0]))
    (Layer(weight='1.weight', bias='1.bias', activation='relu'),)
    """
    hooked = any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
    if hooked or y.ndim != 1 or y.is_floating_point() or x.ndim < 2 or not all(map(_plain, model.modules())):
        return None
    tensors = model.state_dict(keep_vars=True)
    if len(tensors) != len({id(tensor) for tensor in tensors.values()}) or any(
        t.dtype != x.dtype for t in tensors.values()
    ):
        return None
    layers = _read(model)
    # One output is no classification, which the other engine knows how to say.
    if (
        not layers
        or len(tensors[layers[-1].weight]) == 1
        or not x.is_floating_point()
        or x[0].numel() != tensors[layers[0].weight].shape[1]
    ):
        return None
    if x.ndim > 2 and not _flattens(model):
        return None
    shapes = tuple((name, tensor.shape, tensor.requires_grad) for name, tensor in tensors.items())
    known = (type(model), layers, shapes, x.shape[1:], x.dtype)
    if known not in _verified:
        if not _agrees_with_autograd(model, layers, x[:2], y[:2]):
            return None
        _verified.add(known)
    return layers


def _plain(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and not {"forward", "__call__", "_call_impl"} & vars(module).keys()


def _read(model: nn.Module, prefix: str = "") -> tuple[Layer, ...] | None:  # noqa: PLR0911
    """Layers by the structure alone; exact types, since a subclass may do anything."""
    if type(model) is nn.Linear:
        return (Layer(f"{prefix}weight", f"{prefix}bias" if model.bias is not None else None),)
    if type(model) is Logistic:
        return _read(model.output, f"{prefix}output.")
    children: list[tuple[str, nn.Module]]
    if type(model) is MLP:
        hidden = [(f"layers.{index}.", layer) for index, layer in enumerate(model.layers)]
        children = [step for entry in hidden for step in (entry, ("", nn.ReLU()))][:-1]
    elif type(model) is nn.Sequential:
        # Not named_children, which leaves out the second use of a module.
        children = [(f"{name}.", child) for name, child in model._modules.items() if child is not None]
    else:
        return None
    layers: list[Layer] = []
    for name, child in children:
        kind = _MODULES.get(type(child))
        if kind:
            if not layers or layers[-1].activation:
                return None
            layers[-1] = replace(layers[-1], activation=kind)
        elif type(child) is nn.Flatten:
            if (child.start_dim, child.end_dim) != (1, -1):
                return None
        elif type(child) is not nn.Identity:
            by_hand = _read(child, prefix + name)
            if by_hand is None:
                return None
            layers.extend(by_hand)
    return tuple(layers)


def _flattens(model: nn.Module) -> bool:
    """Whether inputs of any shape are flattened before the first layer."""
    if type(model) is nn.Sequential:
        first = next((child for child in model._modules.values() if type(child) is not nn.Identity), None)
        return type(first) is nn.Flatten
    return type(model) in (MLP, Logistic)


def _agrees_with_autograd(model: nn.Module, layers: Sequence[Layer], x: Tensor, y: Tensor) -> bool:
    """Gradients by hand and by autograd on one client, to float tolerance."""
    named = dict(model.named_parameters())
    device = next(iter(named.values())).device
    # Labels that are to be ignored are a matter of shares, others are yet to be checked.
    x, y = x.to(device), y.to(device).clamp(min=0, max=len(named[layers[-1].weight]) - 1)
    trained = {name: p for name, p in named.items() if p.requires_grad}
    if not trained:
        return False
    with torch.enable_grad():
        expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(trained.values()), allow_unused=True)
    weights = {name: p.detach().unsqueeze(0) for name, p in named.items()}
    _, products = backward(
        layers, weights, {name: weights[name] for name in trained}, x.flatten(1)[None], y[None], None
    )
    by_hand = {name: product(left, right)[0] for name, left, right in products}
    return all(
        gradient is not None and name in by_hand and torch.allclose(by_hand[name], gradient, rtol=1e-3, atol=1e-5)
        for name, gradient in zip(trained, expected, strict=True)
    )
