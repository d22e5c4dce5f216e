"""Curvature one example and one class at a time, with nothing but autograd in float64."""

from __future__ import annotations

import copy

import torch
from torch.nn import functional as F


def vectors(outputs, estimator, label):
    """Gradients of log-likelihoods by the outputs of one example, times the root of their probability."""
    p = outputs.detach().softmax(-1)
    flat = p.reshape(-1, p.shape[-1])
    if estimator == "empirical":
        return [(F.one_hot(label.reshape(-1), flat.shape[-1]) - flat).reshape(p.shape)]
    found = []
    for position in range(len(flat)):
        for c in range(flat.shape[-1]):
            v = torch.zeros_like(flat)
            v[position] = -flat[position] * flat[position, c].sqrt()
            v[position, c] += flat[position, c].sqrt()
            found.append(v.reshape(p.shape))
    return found


def gradients(model, x, y, estimator="exact"):
    """For every example a list of gradients by name, one per vector."""
    model = copy.deepcopy(model).double().eval()
    for p in model.parameters():
        p.requires_grad_()
    names = [n for n, _ in model.named_parameters()]
    x = x.double() if x.is_floating_point() else x
    for one, label in zip(x, y, strict=True):
        outputs = model(one[None])
        found = []
        for v in vectors(outputs, estimator, label[None]):
            grads = torch.autograd.grad(
                outputs, list(model.parameters()), v, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            found.append(dict(zip(names, grads, strict=True)))
        yield found


def diagonal(model, x, y, estimator="exact"):
    """``mean_x sum_v g^2`` by name."""
    total = {}
    for found in gradients(model, x, y, estimator):
        for g in found:
            for name, tensor in g.items():
                total[name] = total.get(name, 0) + tensor.square() / len(x)
    return total


def taps(model, layer, x, y, estimator="exact"):
    """Rows of inputs [T, d] and of output gradients [T, out] of one module, example by example, vector by vector."""
    model = copy.deepcopy(model).double().eval()
    module = model.get_submodule(layer)
    seen = {}

    def hook(_, inputs, output):
        seen["a"], seen["z"] = inputs[0], output
        return output.clone()  # what follows may work in place

    module.register_forward_hook(hook)
    x = x.double() if x.is_floating_point() else x
    for one, label in zip(x, y, strict=True):
        outputs = model(one[None])
        a, z = patches(module, seen["a"]), seen["z"]
        for v in vectors(outputs, estimator, label[None]):
            (g,) = torch.autograd.grad(outputs, z, v, retain_graph=True)
            yield a.detach(), by_position(module, g)


def patches(module, a):
    """Inputs of one example as rows, patch by patch in plain Python."""
    if isinstance(module, torch.nn.Linear):
        rows = a.reshape(-1, a.shape[-1])
    else:
        if isinstance(module, torch.nn.Conv1d):
            a = a.unsqueeze(2)
        kernel, stride, pad, dilation = (
            v if len(v) == 2 else (z, *v)
            for v, z in (
                (module.kernel_size, 1),
                (module.stride, 1),
                (module.padding, 0),
                (module.dilation, 1),
            )
        )
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        sides = (pad[1], pad[1], pad[0], pad[0]) if pad[0] else (pad[1], pad[1])
        if a.shape[2] == 1 and mode != "constant":
            a = F.pad(a[:, :, 0], (pad[1], pad[1]), mode=mode).unsqueeze(2)
        elif any(sides):
            a = F.pad(a, sides, mode=mode)
        _, _, height, width = a.shape
        rows = []
        for i in range(0, height - dilation[0] * (kernel[0] - 1), stride[0]):
            for j in range(0, width - dilation[1] * (kernel[1] - 1), stride[1]):
                block = a[0, :, i : i + dilation[0] * (kernel[0] - 1) + 1 : dilation[0]]
                rows.append(block[:, :, j : j + dilation[1] * (kernel[1] - 1) + 1 : dilation[1]].reshape(-1))
        rows = torch.stack(rows)
    return rows


def by_position(module, g):
    """Output gradients of one example as rows [T, out]."""
    return g.reshape(-1, g.shape[-1]) if isinstance(module, torch.nn.Linear) else g[0].flatten(1).T


def kfac(model, layer, x, y, estimator="exact"):
    """A and G as FisherKfac defines them, without groups."""
    module = model.get_submodule(layer)
    a_total, g_total, positions = 0, 0, 0
    count = len(vectors(model.double().eval()(x[:1].double() if x.is_floating_point() else x[:1]), estimator, y[:1]))
    for i, (a, g) in enumerate(taps(model, layer, x, y, estimator)):
        rows = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1) if module.bias is not None else a
        if i % count == 0:
            for row in rows:
                a_total = a_total + torch.outer(row, row)
            positions += len(rows)
        for row in g:
            g_total = g_total + torch.outer(row, row)
    return a_total / len(x), g_total / positions
