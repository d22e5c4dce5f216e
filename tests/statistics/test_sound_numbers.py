"""Which matrices can be Gram matrices as clients measure, round and send them, and which cannot."""

from __future__ import annotations

import pytest
import torch

from fedmerge import InvalidOption
from fedmerge.statistics.sending.compression import decode, encode
from fedmerge.statistics.sending.soundness import FIXED_POINT, semidefinite, sound, squares


def rows(n, size, seed=0):
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed)).relu() + 0.1


def gram(n, size, scales=None, dtype=torch.float32):
    found = rows(n, size) * (1.0 if scales is None else scales)
    return (found.T @ found / n).to(dtype)


def least(matrix):
    """The smallest eigenvalue, in units of the diagonal."""
    scale = matrix.diagonal().double().clamp_min(1e-300).sqrt()
    return float(torch.linalg.eigvalsh(matrix.double() / scale[:, None] / scale)[0])


HONEST = {
    "many rows": gram(400, 20),
    "fewer rows than columns": gram(5, 40),
    "one row": gram(1, 30),
    "one column": gram(3, 1),
    "nothing seen": torch.zeros(6, 6),
    "some units silent": gram(50, 12, torch.tensor([0.0, 1.0] * 6)),
    "scales over ten orders": gram(200, 11, torch.logspace(-5, 5, 11)),
    "scales over thirty orders": gram(200, 11, torch.logspace(-22, 7, 11, dtype=torch.float64), torch.float64),
    "tiny": gram(100, 8) * 1e-36,
    "below float32's normal numbers": gram(100, 8) * 1e-42,
    "large": gram(100, 8) * 1e13,
    "halves": gram(100, 30).half(),
    "halves of few rows": gram(3, 60).half(),
    "halves whose small numbers vanish": gram(100, 9, torch.logspace(-5, 1, 9)).half(),
    "bfloat16": gram(3, 60).bfloat16(),
    "doubles": gram(3, 60, dtype=torch.float64),
    "groups": torch.stack([gram(2, 10), torch.zeros(10, 10), gram(50, 10)]),
    "groups of very different scale": torch.stack([gram(20, 5) * 1e-20, gram(20, 5) * 1e9]),
    "not quite symmetric": gram(60, 16) * (1 + 1e-3 * torch.rand(16, 16, generator=torch.Generator().manual_seed(3))),
}


@pytest.mark.parametrize("case", HONEST)
def test_what_honest_clients_measure_passes_and_stays_what_it_was(case):
    matrix = HONEST[case]
    found = semidefinite("gram", "w", matrix)
    scale = matrix.double().abs().amax()
    assert found.dtype in (torch.float32, torch.float64)
    assert torch.equal(found, found.transpose(-1, -2))
    assert (found.double() - matrix.double()).abs().max() <= 0.01 * scale
    for group in found if found.ndim == 3 else [found]:
        assert least(group) > -1e-4


@pytest.mark.parametrize("level", ["none", "float16", "int8"])
@pytest.mark.parametrize("case", [c for c in HONEST if HONEST[c].itemsize > 2 and c != "not quite symmetric"])
def test_however_it_was_compressed(case, level):
    sent = encode({"w": HONEST[case]}, level, 400).state
    found = semidefinite("gram", "w", decode(sent)["w"])
    assert found.shape == HONEST[case].shape
    assert bool(found.isfinite().all())


def test_what_rounding_made_indefinite_is_projected():
    rounded = gram(3, 60).bfloat16()
    assert least(rounded) < -1e-3
    assert least(semidefinite("gram", "w", rounded)) > -1e-9


def flipped(matrix, which):
    """One eigenvalue negated; the diagonal stays positive."""
    values, vectors = torch.linalg.eigh(matrix.double())
    values[which] *= -1
    return (vectors * values) @ vectors.T


def equicorrelated(size, correlation):
    return torch.eye(size) * (1 - correlation) + correlation


BAD = {
    "a pair beyond its diagonal": (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "allows"),
    "pairs within, the whole beyond": (equicorrelated(10, -0.5), "eigenvalue"),
    "an eigenvalue negated": (flipped(gram(400, 20), 15), "positive semi-definite"),
    "the diagonal taken away": (equicorrelated(6, 0.5) - torch.eye(6), "allows"),
    "a negative diagonal": (-gram(20, 6), "negative diagonal"),
    "one negative entry on it": (torch.diag(torch.tensor([1.0, 1.0, -0.01])), "negative diagonal"),
    "a silent unit that correlates": (torch.tensor([[0.0, 0.5], [0.5, 1.0]]), "allows"),
    "nothing but a pair": (torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "allows"),
    "not symmetric": (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
    "a group of several": (torch.stack([torch.eye(2), torch.tensor([[1.0, -3.0], [-3.0, 1.0]])]), "allows"),
    "a small group beside a large one": (
        torch.stack([1e9 * torch.eye(2), 1e-9 * torch.tensor([[1.0, 2.0], [2.0, 1.0]])]), "allows",
    ),
    "a block of small scale": (
        torch.block_diag(1e6 * torch.eye(2), torch.tensor([[1e3, 3e3], [3e3, 1e3]])), "allows",
    ),
    "noise with a good diagonal": (
        torch.eye(30) + 0.9 * (gram(30, 30) > gram(30, 30).median()).float().sub(0.5).fill_diagonal_(0), "positive",
    ),
    "huge": (gram(20, 4) * 1e30, "beyond 1e[+]15"),
    "infinite": (gram(20, 4) / 0, "NaN or infinite"),
    "NaN": (gram(20, 4) * float("nan"), "NaN or infinite"),
    "as good as nothing": (torch.full((4, 4), 1e-320, dtype=torch.float64), "measures"),
    "whole numbers": (torch.eye(3, dtype=torch.int64), "int64"),
    "flags": (torch.eye(3, dtype=torch.bool), "bool"),
    "complex": (torch.eye(3, dtype=torch.complex64), "complex64"),
    "sparse": (torch.eye(3).to_sparse(), "dense"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_no_client_can_have_measured_is_refused(case):
    matrix, words = BAD[case]
    with pytest.raises(InvalidOption, match=words):
        semidefinite("gram", "w", matrix)


def test_numbers_come_back_in_float32_or_better():
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float32):
        assert sound("secants", "slope", torch.tensor([-2.0, 0.5]).to(dtype)).tolist() == [-2.0, 0.5]
        assert sound("secants", "slope", torch.zeros(2).to(dtype)).dtype == torch.float32
    assert squares("fisher_diag", "w", torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert squares("fisher_diag", "w", torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("value", [-1e-30, 1.1e15, float("inf"), float("nan")])
def test_squares_are_not_negative_and_bounded(value):
    with pytest.raises(InvalidOption, match="'w'"):
        squares("fisher_diag", "w", torch.tensor([1.0, value]))


def test_sums_in_fixed_point_may_be_off_by_what_it_rounds():
    small = gram(100, 5) * 2.0**-30
    rounded = (small * 2.0**33).round() / 2.0**33
    broken = rounded - torch.diag(rounded.diagonal()) + torch.diag(rounded.diagonal() - 2.0**-31)
    semidefinite("secants", "curvature", broken, FIXED_POINT)
    with pytest.raises(InvalidOption):
        semidefinite("secants", "curvature", broken)
    with pytest.raises(InvalidOption):
        semidefinite("secants", "curvature", flipped(gram(400, 20), 15), FIXED_POINT)


def test_the_last_digit_that_float32_holds_is_an_honest_clients():
    draws = torch.Generator().manual_seed(0)
    gradients = torch.randn(30, 8, generator=draws) * 2.0**-73.5
    factor = gradients.T @ gradients / 30  # a few multiples of 2**-149, and nothing on most of the diagonal
    factor.fill_diagonal_(0.0)
    assert 0 < factor.abs().max() <= 2.0**-147
    semidefinite("fisher_kfac", "G", factor)
