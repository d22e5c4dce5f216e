"""Fisher information against a loop over examples and classes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmerge import compute_statistics
from fedmerge.errors import InvalidOption
from fedmerge.statistics import FisherDiag, FisherKfac, Gram
from fedmerge.statistics.measuring.taps import probe
from tests.statistics.brute_force import diagonal, gradients, kfac, patches
from tests.statistics.zoo import MODELS, made, sequences

FACTORED = [
    "mlp",
    "no bias",
    "cnn",
    "dilated",
    "oblong",
    "reflect",
    "circular",
    "conv1d",
    "group norm",
    "batch norm",
    "in place",
]


def close(got, wanted, tolerance):
    assert got.shape == wanted.shape
    assert (got.double() - wanted).norm() <= tolerance * wanted.norm() + 1e-300


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("name", MODELS)
def test_the_diagonal_is_that_of_per_example_gradients(name, estimator):
    model, x, y = made(name)
    wanted = diagonal(model, x, y, estimator)
    kind = FisherDiag(estimator=estimator)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        got = kind.measure(model.to(dtype), [(x.to(dtype), y)], None)
        assert list(got) == [n for n, p in model.named_parameters() if p.requires_grad]
        for parameter, tensor in got.items():
            assert tensor.dtype == dtype
            close(tensor, wanted[parameter], tolerance)


@pytest.mark.parametrize("name", ["group norm", "batch norm", "vit"])
def test_scales_and_shifts_of_norms_need_no_pass_for_each_example(name):
    model, x, _ = made(name)
    scaled = {n for n, m in model.named_modules() if isinstance(m, nn.GroupNorm | nn.BatchNorm2d | nn.LayerNorm)}
    assert scaled
    served = probe(model.double(), x.double(), lambda name: True, scales=True).scales
    assert {name.rpartition(".")[0] for layer in served for name in layer.names} == scaled


@pytest.mark.parametrize("index", [0, 1])
def test_sequences_have_a_label_at_every_position(index):
    model, tokens, labels = sequences()[index]
    for estimator in ("exact", "empirical"):
        wanted = diagonal(model, tokens, labels, estimator)
        got = FisherDiag(estimator=estimator).measure(model.double(), [(tokens, labels)], None)
        for parameter, tensor in got.items():
            close(tensor, wanted[parameter], 1e-9)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("name", FACTORED)
def test_factors_are_those_of_rows_one_by_one(name, estimator):
    model, x, y = made(name)
    got = FisherKfac(estimator=estimator).measure(model.double(), [(x.double(), y)], None)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv1d)]
    covered = set()
    for layer in layers:
        a, g = kfac(model, layer, x, y, estimator)
        close(got[f"{layer}.weight.A"], a, 1e-9)
        close(got[f"{layer}.weight.G"], g, 1e-9)
        covered |= {f"{layer}.weight.A", f"{layer}.weight.G"}
    wanted = diagonal(model, x, y, estimator)
    for key in set(got) - covered:
        assert key.endswith(".diag")
        close(got[key], wanted[key.removesuffix(".diag")], 1e-9)
    single = model.float()
    for key, tensor in FisherKfac(estimator=estimator).measure(single, [(x.float(), y)], None).items():
        close(tensor, got[key].double(), 1e-4)


def test_one_example_of_a_linear_layer_is_exact():
    model, x, y = made("mlp")
    got = FisherKfac().measure(model.double(), [(x[:1].double(), y[:1])], None)
    for layer in ("0", "2"):
        (found,) = gradients(model, x[:1], y[:1])
        rows = [torch.cat([g[f"{layer}.weight"], g[f"{layer}.bias"][:, None]], 1).reshape(-1) for g in found]
        wanted = sum(torch.outer(r, r) for r in rows)
        close(torch.kron(got[f"{layer}.weight.G"], got[f"{layer}.weight.A"]), wanted, 1e-12)


@pytest.mark.parametrize("name", ["groups", "depthwise"])
def test_grouped_convolutions_have_factors_per_group(name):
    model, x, y = made(name)
    conv = model[0]
    model = model.double()
    got = FisherKfac().measure(model, [(x.double(), y)], None)
    grams = Gram().measure(model, [(x.double(), y)], None)
    size = conv.in_channels // conv.groups
    for group in range(conv.groups):
        channels = x.double()[:, group * size : (group + 1) * size]
        plain = nn.Conv2d(size, conv.out_channels // conv.groups, conv.kernel_size)
        rows = torch.cat([patches(plain, one[None]) for one in channels])
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        close(got["0.weight.A"][group], rows.T @ rows / len(x), 1e-9)
        close(grams["0.weight"][group], rows.T @ rows / len(rows), 1e-9)
    # One group's weights alone, the others' frozen into the rest: its G must be that block.
    wanted = diagonal(model, x, y)
    trace = got["0.weight.G"].diagonal(dim1=-2, dim2=-1).reshape(-1)
    positions = 16
    ratio = wanted["0.bias"] / (positions * trace)
    assert ratio.isfinite().all()


@pytest.mark.parametrize("name", ["functional", "weight norm", "unusual", "gru"])
def test_weights_without_factors_come_with_their_diagonal(name):
    model, x, y = made(name)
    got = FisherKfac().measure(model.double(), [(x.double(), y)], None)
    wanted = diagonal(model, x, y)
    named = {key.rpartition(".")[0] for key in got}
    biases = {n for n in wanted if n not in named}
    assert all(n.endswith("bias") for n in biases)
    for key, tensor in got.items():
        if key.endswith(".diag"):
            close(tensor, wanted[key.removesuffix(".diag")], 1e-9)
    assert "fc.weight.A" not in got or name == "unusual"


def test_lstm_factors_give_the_exact_diagonal_of_a_single_step():
    model, x, y = made("lstm cell")
    one = x[:1, :1].double()
    got = FisherKfac().measure(model.double(), [(one, y[:1])], None)
    wanted = diagonal(model, one, y[:1])
    for gate in ("ih", "hh"):
        block = torch.outer(got[f"cell.weight_{gate}.G"].diagonal(), got[f"cell.weight_{gate}.A"].diagonal())
        close(block[:, :-1], wanted[f"cell.weight_{gate}"], 1e-9)
        close(block[:, -1], wanted[f"cell.bias_{gate}"], 1e-9)


@pytest.mark.parametrize("kind", [FisherDiag(), FisherKfac(), Gram()])
@pytest.mark.parametrize("name", ["cnn", "group norm", "lstm"])
def test_batches_and_pieces_do_not_matter(name, kind, monkeypatch):
    model, x, y = made(name)
    model, x = model.double(), x.double()
    whole = kind.measure(model, [(x, y)], None)
    for size in (1, 3):
        parts = kind.measure(model, list(zip(x.split(size), y.split(size), strict=True)), None)
        torch.testing.assert_close(parts, whole)
    monkeypatch.setattr("fedmerge.statistics.measuring.taps._BUDGET", 1)
    monkeypatch.setattr("fedmerge.statistics.measuring.squared_gradients._BUDGET", 1)
    torch.testing.assert_close(kind.measure(model, [(x, y)], None), whole)


def test_sampled_labels_converge_to_the_exact_expectation_and_repeat():
    model, x, y = made("mlp")
    many = [(x.repeat(500, 1), y.repeat(500))]
    exact = FisherDiag().measure(model, many, None)
    sampled = FisherDiag(estimator="sampled").measure(model, many, None)
    for name, tensor in exact.items():
        assert (sampled[name] - tensor).norm() < 0.1 * tensor.norm()
        assert not torch.equal(sampled[name], tensor)
    torch.testing.assert_close(FisherDiag(estimator="sampled").measure(model, many, None), sampled, rtol=0, atol=0)


def test_auto_samples_where_an_example_has_many_outputs():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, x = nn.Linear(2, 129), torch.randn(3, 2)
    y = torch.zeros(3, dtype=torch.long)
    sampled = FisherDiag(estimator="sampled").measure(model, [(x, y)], None)
    torch.testing.assert_close(FisherDiag().measure(model, [(x, y)], None), sampled, rtol=0, atol=0)


def test_squared_error_has_a_unit_normal():
    model, x, _ = made("mlp")
    target = torch.randn(6, 3)
    got = compute_statistics(model.double(), [(x.double(), target.double())], ["fisher_diag"], loss=F.mse_loss)[
        "fisher_diag"
    ]
    wanted = 0
    for one in x.double():
        for output in range(3):
            grads = torch.autograd.grad(model(one[None])[0, output], list(model.parameters()))
            wanted = wanted + grads[0].square() / 6
    close(got["0.weight"], wanted, 1e-9)


def test_any_loss_has_its_empirical_fisher_example_by_example():
    model, x, y = made("mlp")
    model, x = model.double(), x.double()

    def loss(outputs, labels):
        return F.multi_margin_loss(outputs, labels)

    got = compute_statistics(model, [(x, y)], ["fisher_diag", "fisher_kfac"], loss=loss)
    wanted = 0
    for one, label in zip(x, y, strict=True):
        grads = torch.autograd.grad(loss(model(one[None]), label[None]), list(model.parameters()))
        wanted = wanted + grads[0].square() / 6
    close(got["fisher_diag"]["0.weight"], wanted, 1e-9)
    assert set(got["fisher_kfac"]) == {"0.weight.A", "0.weight.G", "2.weight.A", "2.weight.G"}
    with pytest.raises(InvalidOption, match="empirical"):
        FisherDiag(estimator="exact", loss=loss).measure(model, [(x, y)], None)


@pytest.mark.parametrize("kind", [FisherDiag(), FisherKfac(), Gram()])
@pytest.mark.parametrize("name", ["batch norm", "dropout", "frozen", "lstm"])
def test_the_model_is_left_as_it_was(name, kind):
    model, x, y = made(name)
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    frozen = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    kind.measure(model, [(x, y)], None)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_and_examples_can_be_restricted():
    model, x, y = made("cnn")
    assert set(FisherDiag(layers=("0",)).measure(model, [(x, y)], None)) == {"0.weight", "0.bias"}
    assert set(FisherKfac(layers=("3.*",)).measure(model, [(x, y)], None)) == {"3.weight.A", "3.weight.G"}
    assert set(Gram(layers=("*",)).measure(model, [(x, y)], None)) == {"0.weight", "3.weight"}
    assert FisherDiag(layers=("none",)).measure(model, [(x, y)], None) == {}
    batches = list(zip(x.split(2), y.split(2), strict=True))
    for kind in (FisherDiag, FisherKfac, Gram):
        torch.testing.assert_close(
            kind(examples=3).measure(model, batches, None), kind().measure(model, [(x[:3], y[:3])], None)
        )


@pytest.mark.parametrize("kind", [FisherDiag(), FisherKfac(), Gram()])
def test_without_examples_there_is_an_error(kind):
    model, x, y = made("mlp")
    for batches in ([], [(x[:0], y[:0])]):
        with pytest.raises(InvalidOption, match="no examples"):
            kind.measure(model, batches, None)


@pytest.mark.parametrize("kind", [FisherDiag(), FisherKfac()])
def test_a_diverged_model_gives_values_that_the_check_refuses(kind):
    model, x, y = made("mlp")
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    value = kind.measure(model, [(x, y)], None)
    with pytest.raises(InvalidOption, match="NaN"):
        kind.check(value, made("mlp")[0].state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_measured_in_float32(dtype):
    model, x, y = made("mlp")
    wanted = FisherDiag().measure(model, [(x, y)], None)
    got = FisherDiag().measure(model.to(dtype), [(x.to(dtype), y)], None)
    for name, tensor in got.items():
        assert tensor.dtype == torch.float32
        assert (tensor - wanted[name]).norm() < 0.1 * wanted[name].norm()
