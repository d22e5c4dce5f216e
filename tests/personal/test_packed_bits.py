"""Masks in bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.errors import InvalidOption
from fedmerge.personal import pack_bits, unpack_bits


@settings(max_examples=25, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(0, 5), max_size=3), seed=st.integers(0, 9))
def test_bits_come_back_and_are_those_of_numpy(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.tolist() == np.packbits(mask.numpy().reshape(-1)).tolist()
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(packed, mask.shape), mask)


@pytest.mark.parametrize("shape", [(2,), (0,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_bytes_of_another_mask_are_refused(shape, dtype):
    with pytest.raises(InvalidOption, match=r"a mask of shape \[2, 3\] has 1 bytes"):
        unpack_bits(torch.zeros(shape, dtype=dtype), (2, 3))
