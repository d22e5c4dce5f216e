"""Frozen parameters, buffers and complex parameters through every method of the toolbox that folds or averages."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fedmerge

METHODS = {
    "task_arithmetic": {"scale": 0.7},
    "ties": {"density": 0.6},
    "metagpt": {},
    "fedgma": {"threshold": 0.9},
    "magmax": {},
    "model_stock": {},
    "slerp": {"of": "updates"},
    "multislerp": {"of": "updates"},
    "karcher": {},
    "soup": {},
}
EACH = pytest.mark.parametrize("method", METHODS)


class Odd(nn.Module):
    """A frozen layer, a batch norm, a complex weight, a number alone and a counter."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.free, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
            torch.manual_seed(99)
            self.fixed = nn.Linear(4, 4).requires_grad_(False)
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64, generator=generator))
        self.temperature = nn.Parameter(torch.tensor(1.0 + seed))
        self.norm.running_mean += seed
        self.norm.running_var += seed
        self.register_buffer("seen", torch.tensor(seed))


BASE, *MODELS = map(Odd, range(4))


@EACH
def test_what_is_not_trained_survives_and_what_is_moves(method):
    before = [copy.deepcopy(model.state_dict()) for model in [BASE, *MODELS]]
    found = fedmerge.merge(MODELS, method, base=BASE, weights=[1, 2, 3], **METHODS[method])
    state, start = found.state_dict(), BASE.state_dict()
    for name, tensor in start.items():
        assert (state[name].dtype, state[name].shape) == (tensor.dtype, tensor.shape)
    for name in ("fixed.weight", "fixed.bias"):
        assert torch.equal(state[name], start[name])
    for name in ("free.weight", "norm.weight", "phase", "temperature"):
        assert bool(state[name].isfinite().all())
    for name in ("free.weight", "phase", "temperature"):
        assert not torch.equal(state[name], start[name]) or method == "model_stock"  # who agrees with nobody stays
    # Statistics are averaged by examples whatever the method, and counters are the largest.
    torch.testing.assert_close(state["norm.running_mean"], torch.full((4,), 14 / 6))
    assert state["seen"].item() == 3
    for model, old in zip([BASE, *MODELS], before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())


@EACH
def test_a_complex_parameter_is_merged_as_the_two_numbers_that_it_is(method):
    """Scopes and lengths are the same either way."""

    class Pair(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.w = nn.Parameter(value)

    values = [model.phase.detach() for model in [BASE, *MODELS]]
    base, *pairs = (Pair(torch.view_as_real(value).clone()) for value in values)
    start, *whole = (Pair(value.clone()) for value in values)
    options = METHODS[method]
    two = fedmerge.merge(pairs, method, base=base, weights=[1, 2, 3], **options).w.detach()
    one = fedmerge.merge(whole, method, base=start, weights=[1, 2, 3], **options).w.detach()
    torch.testing.assert_close(torch.view_as_real(one), two)
