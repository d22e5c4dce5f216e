"""Tensors on the wire."""

from __future__ import annotations

import pytest
import torch

from fedmerge.strategies import from_arrays, to_arrays
from fedmerge.wire.flower_records import statistics_from_reply
from fedmerge.wire.record_values import statistics_records
from tests.federation import reply

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)])
def test_every_dtype_and_shape_comes_back(dtype, shape):
    tensor = (torch.arange(24).reshape(2, 3, 4) % 3).to(dtype)
    tensor = tensor.flatten()[: torch.Size(shape).numel()].reshape(shape)
    back = from_arrays(to_arrays({"a.b": tensor}))["a.b"]
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


def test_decoded_tensors_own_their_memory():
    record = to_arrays({"w": torch.zeros(3)})
    from_arrays(record)["w"].add_(1)
    assert torch.equal(from_arrays(record)["w"], torch.zeros(3))


def test_non_contiguous_tensors_travel():
    tensor = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(from_arrays(to_arrays({"w": tensor}))["w"], tensor)


def test_statistics_travel_as_records_of_their_own():
    statistics = {"local_steps": {"local_steps": torch.tensor(3.0, dtype=torch.float64)}}
    message = reply(5, {"w": torch.zeros(1)}, extra=statistics_records(statistics))
    found = statistics_from_reply(message.content, None)
    assert found["local_steps"]["local_steps"].item() == 3.0
    assert set(message.content.array_records) == {"arrays", "statistics.local_steps"}
