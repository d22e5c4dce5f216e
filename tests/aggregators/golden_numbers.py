"""Clients of random numbers, and merges of them as rows of NumPy."""

from __future__ import annotations

import numpy as np
import torch

from fedmerge import ClientUpdate, MergeContext

SHAPES = {"w": (4, 3), "kernel": (2, 2, 3, 3), "b": (5,), "temperature": (), "none": (0, 2)}


def drawn(seed):
    """A state of NumPy arrays."""
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=shape) for name, shape in SHAPES.items()}


def added(base, *vectors):
    """The base with task vectors added."""
    return {name: base[name] + sum(vector[name] for vector in vectors) for name in base}


def merged(aggregator, states, weights=None, base=None, **known):
    """The aggregator's result, a state of NumPy arrays."""
    weights = weights or [1.0] * len(states)
    sent = [ClientUpdate(i, tensors(state), weights[i]) for i, state in enumerate(states)]
    context = MergeContext(base=None if base is None else tensors(base), signed=True, **known)
    found, memory = aggregator.merge(sent, context, {})
    assert memory == {}
    assert all(found[name].shape == array.shape for name, array in states[0].items())
    return {name: tensor.numpy() for name, tensor in found.items()}


def tensors(state):
    """As torch knows them, without sharing memory."""
    return {name: torch.tensor(array) for name, array in state.items()}


def flat(state):
    """All numbers in a row."""
    return np.concatenate([np.ravel(state[name]) for name in SHAPES])


def rows(states):
    """One row for each state."""
    return np.stack([flat(state) for state in states])


def check_equal(found, want, **tolerances):
    """The same numbers, tensor by tensor."""
    assert found.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(found[name], want[name], err_msg=name, **{"rtol": 1e-9, "atol": 1e-11, **tolerances})
