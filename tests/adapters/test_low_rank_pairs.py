"""Pairs are found by name and shape; their sums are exact without full matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedmerge.adapters import Cores, Term, best_of_rank, find_pairs, norm_of_sum, total
from fedmerge.adapters.low_rank_pairs import padded, rank_of
from fedmerge.adapters.small_cores import Basis
from fedmerge.errors import AdapterError, InvalidOption
from tests.adapters.pair_cases import SHAPES, names, pair_state


def test_pairs_are_found_under_all_of_pefts_names():
    state = {
        "m.q.lora_A.default.weight": torch.ones(2, 4),
        "m.q.lora_B.default.weight": torch.ones(4, 2),
        "m.q.lora_magnitude_vector.default.weight": torch.ones(4),  # DoRA's, a plain parameter
        "m.ff.ia3_l.default": torch.ones(4, 1),
        "m.k.lora_A.weight": torch.ones(3, 4),
        "m.k.lora_B.weight": torch.ones(5, 3),
        "m.k.lora_B.bias": torch.ones(5),
        "conv.lora_A.style.weight": torch.ones(2, 3, 5, 5),
        "conv.lora_B.style.weight": torch.ones(7, 2, 1, 1),
        "words.lora_embedding_A": torch.ones(2, 100),
        "words.lora_embedding_B": torch.ones(8, 2),
        "lora_A.default.weight": torch.ones(1, 4),
        "lora_B.default.weight": torch.ones(4, 1),
    }
    found = {(pair.layer, pair.kind, pair.adapter, pair.rank(state)) for pair in find_pairs(state)}
    assert found == {
        ("m.q", "linear", "default", 2),
        ("m.k", "linear", "", 3),
        ("conv", "convolution", "style", 2),
        ("words", "embedding", "", 2),
        ("", "linear", "default", 1),
    }


def test_pairs_of_ones_own_names_are_found_by_patterns():
    state = {
        f"b{i}.{side}.weight": torch.ones(shape) for i in range(2) for side, shape in (("down", (2, 5)), ("up", (4, 2)))
    }
    pairs = find_pairs(state, ["*.down.weight:*.up.weight"])
    assert [(pair.a, pair.b, pair.layer) for pair in pairs] == [
        ("b0.down.weight", "b0.up.weight", "b0"),
        ("b1.down.weight", "b1.up.weight", "b1"),
    ]
    for wrong in ("*.down.weight", "*.*.down:*.up", "*.down:b.up", ":up"):
        with pytest.raises(InvalidOption, match="pairs"):
            find_pairs(state, [wrong])
    with pytest.raises(InvalidOption, match="no two tensors are called"):
        find_pairs(state, ["*.sideways:*.up.weight"])


def test_a_factor_alone_and_shapes_that_do_not_fit_are_named():
    alone = {"q.lora_A.default.weight": torch.ones(2, 4)}
    with pytest.raises(AdapterError, match=r"'q\.lora_B\.default\.weight', is not among"):
        find_pairs(alone)
    assert find_pairs(alone, lenient=True) == ()
    crossed = {**alone, "q.lora_B.default.weight": torch.ones(2, 4)}
    with pytest.raises(AdapterError, match=r"'q.lora_A.default.weight' \[2, 4\]"):
        find_pairs(crossed)
    assert find_pairs(crossed, lenient=True) == ()


def test_updates_have_the_shape_of_the_layers_weight():
    state = pair_state(2, 0)
    shapes = {pair.layer: tuple(pair.update(state).shape) for pair in find_pairs(state)}
    assert shapes == {"fc": (5, 7), "conv": (4, 3, 3, 3), "words": (9, 6)}
    conv, a, b = nn.Conv2d(3, 4, 3, bias=False), *(state[name] for name in names("conv"))
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        conv.weight.copy_(next(p for p in find_pairs(state) if p.layer == "conv").update(state, 0.5))
    torch.testing.assert_close(conv(x), 0.5 * nn.functional.conv2d(nn.functional.conv2d(x, a), b), rtol=1e-4, atol=1e-5)


def terms(seed=0, count=3, out=9, width=7, ranks=(2, 3, 1), dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    weights = [0.5, -1.5, 4.0]
    return [
        Term(torch.randn(out, r, generator=draw).to(dtype), torch.randn(r, width, generator=draw).to(dtype), w)
        for r, w in zip(ranks[:count], weights, strict=False)
    ]


def full(given):
    return sum(t.weight * t.b.double() @ t.a.double() for t in given)


def test_the_best_pair_is_the_cut_singular_value_decomposition():
    given = terms()
    left, values, right = torch.linalg.svd(full(given), full_matrices=False)
    for rank in range(1, 6):
        b, a = best_of_rank(given, rank)
        want = left[:, :rank] * values[:rank] @ right[:rank]
        torch.testing.assert_close(b.double() @ a.double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a @ a.T, torch.eye(rank), rtol=0, atol=1e-5)
        lost = torch.linalg.matrix_norm(full(given) - b.double() @ a.double())
        assert math.isclose(float(lost), float(values[rank:].norm()), rel_tol=1e-4, abs_tol=1e-4)
    assert math.isclose(norm_of_sum(given), float(values.norm()), rel_tol=1e-6)
    torch.testing.assert_close(torch.mm(*total(given)).double(), full(given), rtol=1e-5, atol=1e-5)


def test_ranks_above_that_of_the_sum_are_filled_with_directions_to_go_on_in():
    given = [Term(torch.zeros(6, 3), torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), 1.0)]
    b, a = best_of_rank(given, 3)
    assert torch.equal(b, torch.zeros(6, 3))
    torch.testing.assert_close(a @ a.T, torch.eye(3), rtol=0, atol=1e-5)  # or nothing could be learnt from there
    b, a = best_of_rank(given, 8)
    assert (b.shape, a.shape) == ((6, 8), (8, 5))


def test_factors_of_very_unequal_size_lose_nothing():
    given = terms()
    given[0] = Term(given[0].b * 1e6, given[0].a * 1e-6, given[0].weight)
    b, a = best_of_rank(given, 6)
    torch.testing.assert_close(b.double() @ a.double(), full(given), rtol=1e-5, atol=1e-5)


def test_cores_hold_every_update_and_many_rows_come_in_blocks():
    draw = torch.Generator().manual_seed(3)
    given = [Term(torch.randn(40_000, 2, generator=draw), torch.randn(2, 6, generator=draw), 0.5) for _ in range(2)]
    cores = Cores(given)
    for i, term in enumerate(given):
        b, a = cores.factors(cores.of(i), 2)
        torch.testing.assert_close(b @ a, term.b @ term.a, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterError, match="no sum"):
        Cores([Term(torch.ones(2, 1), torch.ones(1, 2)), Term(torch.ones(3, 1), torch.ones(1, 2))])


def test_equal_columns_make_one_direction():
    block = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    basis = Basis([block, block * 3, torch.zeros(30, 2)])
    assert basis.size == 4
    torch.testing.assert_close(basis.lift(basis.coordinates(1)), block * 3, rtol=1e-5, atol=1e-5)


def test_smaller_ranks_are_filled_up_with_zeros_and_told_again():
    small, like = pair_state(1, 0), pair_state(3, 1)
    filled = padded(small, find_pairs(like), like)
    for pair in find_pairs(filled):
        assert filled[pair.a].shape == like[pair.a].shape
        torch.testing.assert_close(pair.update(filled), pair.update(small))
        assert rank_of(*pair.factors(filled)) == 1
    assert padded(like, find_pairs(small), small).keys() == like.keys()  # a larger rank stays, and is refused later
    assert set(SHAPES) == {pair.layer for pair in find_pairs(filled)}
