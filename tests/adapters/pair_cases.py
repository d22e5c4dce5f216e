"""Low-rank pairs for tests: clients of unequal ranks, alphas and weights, and their updates in full."""

from __future__ import annotations

import torch

from fedmerge import ClientUpdate

SHAPES = {
    "fc": ((5, 7), "linear"),
    "conv": ((4, 3, 3, 3), "convolution"),
    "words": ((6, 9), "embedding"),
}
"""By layer, [out, in, ...] of the product ``B A``; that of an embedding is [width, words]."""


def names(layer):
    kind = SHAPES[layer][1]
    if kind == "embedding":
        return f"{layer}.lora_embedding_A.default", f"{layer}.lora_embedding_B.default"
    return f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"


def pair_state(rank, seed, dtype=torch.float32, layers=tuple(SHAPES)):
    """Factors of every layer, and a bias beside them."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for layer in layers:
        (out, *rest), kind = SHAPES[layer]
        a, b = names(layer)
        state[a] = torch.randn(rank, *rest, generator=draw, dtype=torch.float64).to(dtype)
        tail = [1] * (len(rest) - 1) if kind == "convolution" else []
        state[b] = torch.randn(out, rank, *tail, generator=draw, dtype=torch.float64).to(dtype)
    state["bias"] = torch.randn(3, generator=draw, dtype=torch.float64).to(dtype)
    return state


def base_state(seed=99):
    """Weights of the frozen layers."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for layer, (shape, kind) in SHAPES.items():
        size = shape[::-1] if kind == "embedding" else shape
        state[f"{layer}.base_layer.weight"] = torch.randn(size, generator=draw)
    return state


def told(state, scaling):
    """The statistic by which a client tells its scaling."""
    return {"adapter_scaling": {name: torch.tensor(scaling, dtype=torch.float64) for name in state if "_A." in name}}


def product(state, layer):
    """``B A`` as a matrix [out, in], in float64."""
    a, b = (state[name].double() for name in names(layer))
    return b.reshape(len(b), -1) @ a.reshape(len(a), -1)


WEIGHTS = (5.0, 1.0, 14.0)
RANKS = (2, 3, 1)
SCALINGS = (2.0, 0.5, 8.0)


def clients(ranks=(2, 2, 2), scalings=None, weights=WEIGHTS, first=0, **how):
    """Updates of clients whose factors are drawn apart."""
    sent = []
    for i, rank in enumerate(ranks):
        state = pair_state(rank, first + i, **how)
        statistics = {} if scalings is None else told(state, scalings[i])
        sent.append(ClientUpdate(i, state, weights[i], statistics))
    return sent


def mean_update(updates, layer, scalings=None):
    """``sum_i p_i s_i B_i A_i``, as a full matrix."""
    whole = sum(update.weight for update in updates)
    scalings = scalings or [1.0] * len(updates)
    return sum(u.weight / whole * s * product(u.state, layer) for u, s in zip(updates, scalings, strict=True))
