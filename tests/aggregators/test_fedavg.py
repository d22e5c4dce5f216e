"""FedAvg against NumPy, and the sum that it is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmerge import ClientUpdate, MergeContext
from fedmerge.aggregators.fedavg import FedAvg
from fedmerge.state import WeightedSum, cast_like, prefixed, with_prefix

# With p = (1, 2, 5) / 8: by hand, (1*1 + 2*3 + 5*(-1)) / 8 = 0.25 and (1*8 + 2*0 + 5*4) / 8 = 3.5.
GOLDEN = [([1.0, 8.0], 1), ([3.0, 0.0], 2), ([-1.0, 4.0], 5)]


def test_golden_numbers():
    updates = [ClientUpdate(i, {"w": torch.tensor(w)}, n) for i, (w, n) in enumerate(GOLDEN)]
    merged, memory = FedAvg().merge(updates, MergeContext(), {})
    assert merged["w"].tolist() == [0.25, 3.5]
    assert memory == {}


def test_the_merge_is_the_papers_formula():
    draw = np.random.default_rng(0)
    shapes, n = {"matrix": (5, 3), "kernel": (2, 3, 3, 3), "scalar": (), "empty": (0, 4)}, np.array([6e4, 17.0, 350.0])
    clients = [{name: draw.normal(size=shape) for name, shape in shapes.items()} for _ in n]
    updates = [ClientUpdate(i, {k: torch.tensor(w) for k, w in c.items()}, n[i]) for i, c in enumerate(clients)]
    merged, _ = FedAvg().merge(iter(updates), MergeContext(), {})
    for name, shape in shapes.items():
        want = sum(p * client[name] for p, client in zip(n / n.sum(), clients, strict=True))
        assert merged[name].shape == shape
        np.testing.assert_allclose(merged[name].numpy(), want, rtol=1e-12)


def test_a_weighted_sum_counts_weights_and_leaves_what_is_added():
    total = WeightedSum()
    states = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, -2.0])}]
    for state, weight in zip(states, (3.0, 0.5), strict=True):
        total.add(state, weight)
    assert total.weight == 3.5
    assert total.tensors["w"].tolist() == [5.5, 5.0]
    assert total.mean()["w"].tolist() == pytest.approx([5.5 / 3.5, 5.0 / 3.5])
    assert [state["w"].tolist() for state in states] == [[1.0, 2.0], [5.0, -2.0]]


@pytest.mark.parametrize(
    ("sent", "summed"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_what_sums_are_taken_in(sent, summed):
    total = WeightedSum()
    total.add({"w": torch.ones(1, dtype=sent)}, 1.0)
    assert total.tensors["w"].dtype == summed


def test_prefixes_come_off_as_they_went_on():
    state = {"a/b": torch.zeros(1), "": torch.ones(1)}
    kept = {**with_prefix("step0", state), **with_prefix("step01", {"c": torch.zeros(2)})}
    assert prefixed("step0", kept) == state
    assert prefixed("step", kept) == {}


def test_cast_like_takes_each_tensors_own_dtype():
    like = {"w": torch.zeros(1, dtype=torch.float16), "v": torch.zeros(1, dtype=torch.float64)}
    cast = cast_like({"w": torch.ones(1), "v": torch.ones(1)}, like)
    assert {name: t.dtype for name, t in cast.items()} == {"w": torch.float16, "v": torch.float64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_stacked_clients_and_single_ones_add_up_to_the_same_bits(dtype):
    """Shapes with and without a remainder for vector instructions, contiguous or not."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"matrix": (7, 13), "kernel": (3, 2, 3, 3), "vector": (257,), "scalar": (), "empty": (0, 4)}
    weights = [0.1, 3.0, 1e-3, 17.0, 60.0]
    real = dtype if not dtype.is_complex else torch.float32
    stacked = {n: torch.randn(len(weights), *s, generator=draw).to(real).to(dtype) for n, s in shapes.items()}
    at_once, one_by_one, transposed = WeightedSum(), WeightedSum(), WeightedSum()
    at_once.add_stacked({n: t[:2] for n, t in stacked.items()}, weights[:2])
    at_once.add_stacked({n: t[2:] for n, t in stacked.items()}, weights[2:])
    for k, weight in enumerate(weights):
        one_by_one.add({n: t[k] for n, t in stacked.items()}, weight)
        turned = {n: t[k].transpose(0, -1).clone().transpose(0, -1) if t.ndim > 2 else t[k] for n, t in stacked.items()}
        transposed.add(turned, weight)
    assert at_once.weight == one_by_one.weight
    for name, total in one_by_one.tensors.items():
        assert torch.equal(at_once.tensors[name], total), name
        assert torch.equal(transposed.tensors[name], total), name


def test_a_sum_of_stacked_clients_holds_one_model():
    total = WeightedSum()
    total.add_stacked({"w": torch.ones(50, 10)}, [1.0] * 50)
    assert total.tensors["w"].untyped_storage().nbytes() == 10 * 4
