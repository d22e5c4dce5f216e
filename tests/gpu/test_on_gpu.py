"""Results on a GPU are those of the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.checks import CHECKS
from tests.gpu.running import exact_float32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_the_gpu_gives_what_the_cpu_gives(check):
    with exact_float32():
        assert check.difference(torch.device("cuda", 0)) <= check.tolerance
