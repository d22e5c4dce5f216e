"""Complex parameters are merged as pairs of real ones, or refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.aggregators.fedatt import FedAtt
from fedmerge.errors import ModelError
from fedmerge.merging import build_pipeline
from fedmerge.registry import build
from fedmerge.server_steps import ServerAdam
from fedmerge.update import ClientUpdate, MergeContext, StackedUpdates

BY_NUMBER = {
    "fedavg": {}, "fednova": {}, "fedatt": {"norm": "frobenius"}, "median": {}, "trimmed_mean": {"trim": 0.2},
    "geometric_median": {}, "krum": {"byzantine": 0}, "norm_clipping": {"bound": 0.5}, "median_norm_clipping": {},
}  # fmt: skip
STEPS = ("", "+server_adam", "+server_momentum")


class Complex(nn.Module):
    def __init__(self, seed):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.view_as_complex(torch.randn(3, 4, 2, generator=rng)))
        self.b = nn.Parameter(torch.randn(3, generator=rng))


class Pairs(nn.Module):
    """The same numbers, none of them complex."""

    def __init__(self, seed):
        super().__init__()
        same = Complex(seed)
        self.w = nn.Parameter(torch.view_as_real(same.w.detach()).clone())
        self.b = same.b


def merged(kind, method, options):
    statistics = [{"local_steps": 3 + i} for i in range(5)]
    return fedmerge.merge(
        [kind(i) for i in range(5)], method, weights=[1, 2, 3, 4, 5], base=kind(9), statistics=statistics, **options
    )


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("method", BY_NUMBER)
def test_complex_numbers_are_merged_as_their_parts(method, step):
    options = {
        name: value for name, value in BY_NUMBER[method].items() if name in build("aggregator", method, {}).__dict__
    }
    found, want = (merged(kind, method + step, options) for kind in (Complex, Pairs))
    assert found.w.dtype == torch.complex64
    torch.testing.assert_close(torch.view_as_real(found.w.detach()), want.w.detach())
    torch.testing.assert_close(found.b, want.b)
    assert found.w.imag.abs().max() > 0


def test_an_adaptive_step_goes_the_way_of_the_update():
    """As torch.optim.Adam does: from 0 towards 1j, not towards 1."""
    base, told = {"w": torch.zeros(2, dtype=torch.cfloat)}, {"w": torch.full((2,), 1j)}
    found, memory = ServerAdam(learning_rate=0.5, tau=1e-3).step(base, told, {})
    m, v = 0.1, 0.01 * 1 + 0.99 * 1e-6
    torch.testing.assert_close(found["w"].imag, torch.full((2,), 0.5 * m / (math.sqrt(v) + 1e-3)))
    assert not found["w"].real.any()
    again, _ = ServerAdam(learning_rate=0.5).step(base, told, memory)
    assert again["w"].imag.min() > found["w"].imag.max()


def test_attention_sees_imaginary_parts():
    base = {"w": torch.zeros(1, dtype=torch.cfloat)}
    updates = [ClientUpdate(0, {"w": torch.tensor([3j])}), ClientUpdate(1, {"w": torch.tensor([0j])})]
    share = math.exp(3) / (1 + math.exp(3))
    found, _ = FedAtt(step_size=1.0).merge(updates, MergeContext(base=base), {})
    torch.testing.assert_close(found["w"], torch.tensor([3j * share]))


@pytest.mark.parametrize("method", ["fedavg+server_adam", "fedatt"])
def test_a_sum_of_stacked_clients_is_that_of_each(method):
    pipeline, models = build_pipeline(method, {}), [dict(Complex(i).state_dict()) for i in range(3)]
    context = MergeContext(base=dict(Complex(9).state_dict()))
    updates = [ClientUpdate(i, state, 1.0 + i) for i, state in enumerate(models)]
    states = {name: torch.stack([state[name] for state in models]) for name in models[0]}
    block = StackedUpdates((0, 1, 2), states, (1.0, 2.0, 3.0), ({}, {}, {}))
    want = pipeline.merge(updates, context).state
    found = pipeline.finish(pipeline.fold([block], context, ()), context, {}, ()).state
    assert found["w"].is_complex()
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("method", ["fisher", "regmean", "fedfisher", "otfusion", "rebasin", "fedavg+ridge_head"])
def test_methods_that_know_layers_refuse_complex_parameters(method):
    with pytest.raises(ModelError, match=r"complex parameters \('w'\).*fedavg"):
        build_pipeline(method, {}).merge([ClientUpdate(0, dict(Complex(0).state_dict()))], MergeContext())
