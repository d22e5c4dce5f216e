"""Slope and curvature along directions, against derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn import functional as F

from fedmerge.errors import InvalidOption
from fedmerge.statistics import Secants


def smooth(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(n=30):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def directions(model):
    generator = torch.Generator().manual_seed(2)
    steps = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}
    return [steps, {"0.weight": steps["0.weight"]}, {"2.bias": steps["2.bias"], "2.weight": steps["2.weight"]}]


def central(model, along, x, y):
    """Slope and Gauss-Newton curvature by forward-mode derivatives."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    rows = []
    for direction in along:
        tangent = {name: direction.get(name, torch.zeros_like(p)) for name, p in parameters.items()}
        rows.append(jvp(lambda p: functional_call(model, p, (x,)), (parameters,), (tangent,))[1])
    j, p = torch.stack(rows), model(x).softmax(1).detach()
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    slope = torch.einsum("mnc,nc->m", j, p - F.one_hot(y, 3)) / len(x)
    return slope, torch.einsum("mnc,ncd,knd->mk", j, inner, j) / len(x)


def test_a_short_reach_gives_derivatives():
    model, (x, y) = smooth(), batch()
    found = Secants(reach=1e-6).along(model, directions(model), [(x, y)])
    slope, curvature = central(model, directions(model), x, y)
    torch.testing.assert_close(found["slope"], slope, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["curvature"], curvature, rtol=1e-4, atol=1e-6)


def test_where_outputs_are_linear_any_reach_does():
    model, (x, y) = smooth(), batch()
    along = directions(model)[2:]
    for reach in (0.1, 3.0):
        found = Secants(reach=reach).along(model, along, [(x, y)])
        torch.testing.assert_close(found["slope"], central(model, along, x, y)[0], rtol=1e-9, atol=1e-12)


def test_batches_do_not_matter_and_the_model_stays_as_it_was():
    model, (x, y) = smooth(), batch()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    whole = Secants().along(model, directions(model), [(x, y)])
    parts = Secants().along(model, directions(model), list(zip(x.split(7), y.split(7), strict=True)))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_memory_is_bounded_by_pieces_of_a_batch(monkeypatch):
    model, (x, y) = smooth(), batch()
    whole = Secants().along(model, directions(model), [(x, y)])
    monkeypatch.setattr("fedmerge.statistics.secants._ROWS", 60)
    torch.testing.assert_close(Secants().along(model, directions(model), [(x, y)]), whole)


def test_positions_of_a_sequence_count_one_by_one():
    model, (x, y) = smooth(), batch()
    found = Secants().along(model, directions(model), [(x.view(6, 5, 4), y.view(6, 5))])
    torch.testing.assert_close(found, Secants().along(model, directions(model), [(x, y)]))


def test_only_so_many_examples_are_measured():
    model, (x, y) = smooth(), batch()
    few = Secants(examples=10).along(model, directions(model), [(x, y)])
    torch.testing.assert_close(few, Secants().along(model, directions(model), [(x[:10], y[:10])]))


def test_what_cannot_be_measured_is_refused():
    model = smooth()
    with pytest.raises(InvalidOption, match="no examples"):
        Secants().along(model, directions(model), [])
    with pytest.raises(InvalidOption, match="needs directions"):
        Secants().measure(model, [batch()], None)
    with pytest.raises(InvalidOption, match="reach"):
        Secants(reach=0.0)
    found = Secants().along(model, directions(model), [batch()])
    Secants().check_answer(found, model.state_dict(), 3)
    for wrong in (2, 4):
        with pytest.raises(InvalidOption, match="directions"):
            Secants().check_answer(found, model.state_dict(), wrong)


@pytest.mark.parametrize("sure", [10.0, 30.0, 36.0, 45.0])
def test_curvature_keeps_its_digits_where_a_client_is_sure_of_its_labels(sure):
    draws = torch.Generator().manual_seed(0)
    model = nn.Linear(6, 4).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(4, 6, generator=draws) / 10)
        model.bias.copy_(torch.tensor([sure, 0.0, 0.0, 0.0]))
    x, y = torch.randn(50, 6, generator=draws, dtype=torch.float64), torch.zeros(50, dtype=torch.long)
    along = [{"weight": torch.randn(4, 6, generator=draws).double() * 1e6} for _ in range(8)]
    told = Secants().along(model, along, [(x, y)])["curvature"]
    p = model(x).detach().softmax(1)
    j = torch.stack([x @ direction["weight"].T for direction in along])
    # The variance of j over classes, by pairs: nothing in it cancels.
    apart = j[..., :, None] - j[..., None, :]
    wanted = torch.einsum("jbcd,kbcd,bc,bd->jk", apart, apart, p, p) / (2 * len(x))
    torch.testing.assert_close(told.double(), wanted, rtol=1e-5, atol=1e-7 * float(wanted.abs().max()))
    Secants().check_answer({"slope": torch.zeros(8), "curvature": told}, dict(model.state_dict()), 8)
