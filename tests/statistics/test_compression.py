"""Statistics in fewer bytes, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.errors import InvalidOption, UnknownName
from fedmerge.statistics import FisherKfac, Gram, LocalSteps, StatisticsSettings, statistic
from fedmerge.statistics.measuring.weight_matrices import symmetric
from fedmerge.statistics.sending.compression import decode, encode, state_bytes
from fedmerge.statistics.sending.settings import compressed, to_settings
from tests.random_statistics import random_factor


def gram(size, rank=None, seed=0):
    """A Gram matrix whose spectrum falls as that of activations does."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4 * size, size, generator=generator) * torch.logspace(0, -3, size)
    rows = rows @ torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    return symmetric(rows.T @ rows / len(rows))  # as those that clients measure are


def value():
    generator = torch.Generator().manual_seed(0)
    return {
        "fc.weight.A": gram(40),
        "fc.weight.G": gram(20, seed=1),
        "grouped.A": torch.stack([gram(6), gram(6, seed=2)]),
        "scale.diag": torch.rand(30, generator=generator) ** 8,
        "moments.mean": torch.randn(30, generator=generator),
        "counts": torch.tensor([3, 0, 7]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }


@pytest.mark.parametrize(
    ("compression", "budget", "tolerance"),
    [("none", 0, 0.0), ("float16", 0, 1e-3), ("int8", 10**9, 0.02), ("auto", 10**9, 0.0)],
)
def test_names_shapes_and_values_come_back(compression, budget, tolerance):
    sent, error = encode(value(), compression, budget)
    back = decode(sent)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in value().items()}
    assert back["counts"].dtype == torch.int64
    for name, tensor in value().items():
        norm = tensor.double().norm()
        assert (back[name].double() - tensor.double()).norm() <= tolerance * norm, name
    assert error <= tolerance
    assert (error == 0) == (tolerance == 0)


def test_the_error_is_the_root_mean_square_of_relative_errors():
    sent, error = encode({"a": gram(20), "b": gram(30, seed=4)}, "int8", 1500)
    back = decode(sent)
    parts = [((back[n] - t).norm() / t.norm()).item() ** 2 for n, t in {"a": gram(20), "b": gram(30, seed=4)}.items()]
    assert error == pytest.approx((sum(parts) / 2) ** 0.5, rel=1e-4)
    assert error > 0.001


def test_symmetric_matrices_take_half():
    sent, _ = encode({"a": gram(100)}, "none", 0)
    assert state_bytes(sent) == 4 * 100 * 101 // 2 + 1
    sent, _ = encode({"a": gram(100)}, "float16", 0)
    assert state_bytes(sent) == 2 * 100 * 99 // 2 + 4 * 100 + 1


@pytest.mark.parametrize("budget", [900, 1500, 2000])
def test_the_budget_is_kept_and_more_of_it_loses_less(budget):
    matrices = {"a": gram(60), "b": gram(30, seed=3)}
    sent, error = encode(matrices, "int8", budget)
    assert state_bytes(sent) <= budget
    assert encode(matrices, "int8", 2 * budget).error < error


def test_auto_takes_the_finest_that_fits():
    matrices = {"a": gram(60)}
    sizes = [state_bytes(encode(matrices, level, 0).state) for level in ("none", "float16")]
    assert encode(matrices, "auto", sizes[0]).error == 0
    assert state_bytes(encode(matrices, "auto", sizes[0] - 1).state) == sizes[1]
    assert state_bytes(encode(matrices, "auto", sizes[1] - 1).state) < sizes[1]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(size=st.integers(1, 20), budget=st.integers(0, 2000), seed=st.integers(0, 99))
def test_what_comes_back_is_positive_semidefinite_with_its_diagonal(size, budget, seed):
    matrix = random_factor(size, torch.Generator().manual_seed(seed))
    back = decode(encode({"a": matrix}, "int8", budget).state)["a"].double()
    assert torch.linalg.eigvalsh(back).min() >= -1e-6 * back.diagonal().max()
    torch.testing.assert_close(back.diagonal(), matrix.diagonal().double(), rtol=0.02, atol=0)


def test_squares_keep_six_orders_of_magnitude():
    squares = {"w": torch.logspace(0, -6, 10)[:, None].expand(10, 3).contiguous()}
    for compression, tolerance in (("float16", 2e-3), ("int8", 0.3)):
        back = decode(encode(squares, compression, 0).state)["w"]
        torch.testing.assert_close(back, squares["w"], rtol=tolerance, atol=0)


@pytest.mark.parametrize("compression", ["none", "float16", "int8", "auto"])
def test_odd_tensors_survive(compression):
    odd = {
        "empty": torch.zeros(0, 3),
        "zero": torch.zeros(4, 4),
        "one": torch.ones(1, 1),
        "nothing": torch.zeros(5),
        "nan": torch.full((3, 3), torch.nan),
        "infinite": torch.tensor([1.0, torch.inf]),
    }
    back = decode(encode(odd, compression, 10**6).state)
    for name, tensor in odd.items():
        torch.testing.assert_close(back[name].float(), tensor, equal_nan=True, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    "sent",
    [
        {"a#upper": torch.zeros(1, 3)},
        {
            "a#vectors": torch.zeros(1, 3, 2, dtype=torch.int8),
            "a#peaks": torch.zeros(1, 5),
            "a#left": torch.zeros(1, 3),
        },
        {"a#correlation": torch.zeros(1, 4).half(), "a#diagonal": torch.ones(1, 3), "a#ndim": torch.tensor(2)},
        {"a#upper": torch.zeros(1, 4), "a#ndim": torch.tensor(2)},
        {"a#peak": torch.zeros(1)},
        {"a": torch.zeros(1), "a#peak": torch.zeros(1)},
        {"a#what": torch.zeros(1)},
    ],
)
def test_parts_that_do_not_fit_together_are_an_error(sent):
    with pytest.raises(InvalidOption, match="'a' came in parts"):
        decode(sent)


def test_all_statistics_share_one_budget():
    model = {"fc.weight": torch.zeros(40, 40)}
    values = [("gram", {"fc.weight": gram(40)}), ("fisher_kfac", {"fc.weight.A": gram(40), "fc.weight.G": gram(40)})]
    for budget in (0.3, 0.6, 1.0, 2.0):
        sent, _ = compressed(values, model, "auto", budget)
        assert sum(map(state_bytes, sent.values())) <= budget * 4 * 1600
    assert compressed(values, model, "auto", 2.0)[1] == 0


def test_settings_travel_as_text():
    assert to_settings(LocalSteps()) == "{}"
    asked = StatisticsSettings(examples=100, layers=("fc*",)).applied(FisherKfac(estimator="empirical"))
    assert statistic("fisher_kfac", to_settings(asked)) == asked
    assert StatisticsSettings(examples=100).applied(Gram(examples=7)).examples == 7
    assert StatisticsSettings(examples=100).applied(LocalSteps()) == LocalSteps()


@pytest.mark.parametrize("settings", ["[", '{"examples": 0}', '{"layer": 1}', "3"])
def test_settings_that_cannot_be_read(settings):
    with pytest.raises(InvalidOption, match="gram"):
        statistic("gram", settings)
    with pytest.raises(UnknownName, match="gramm"):
        statistic("gramm", "{}")


@pytest.mark.parametrize(
    "options", [{"examples": 0}, {"compression": "zip"}, {"budget": 0.0}, {"budget": float("nan")}]
)
def test_settings_out_of_range(options):
    with pytest.raises(InvalidOption):
        StatisticsSettings(**options)
