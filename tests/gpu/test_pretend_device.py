"""On a device that is not there, tensors of two devices do not meet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.checks import CHECKS
from tests.gpu.pretend_device import can_pretend

ROOT = Path(__file__).parents[2]
# One of each kind; all of them take minutes: python -m tests.gpu.pretend_device
FEW = (
    "train_cohort cnn sgd",
    "statistic gram cnn, data on the CPU",
    "merge gamf mlp, data on the CPU",
    "merge fedavg mlp, models on two devices",
    "merge pfnm mlp, data on the CPU",
    "refine ridge_head mlp, data on the CPU",
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: torch hears of a device once and for all."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )


needs_python_devices = pytest.mark.skipif(not can_pretend(), reason="this torch takes no devices made in Python")


def test_the_few_are_among_the_checks():
    assert set(FEW) <= {check.name for check in CHECKS}


@needs_python_devices
def test_results_on_another_device_are_those_of_the_cpu():
    done = run("-m", "tests.gpu.pretend_device", *FEW)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{len(FEW)} checks, 0 failed"


MEETING = """
import torch
from tests.gpu.pretend_device import Pretending, pretend_device
device = pretend_device()
here = torch.ones(3)
with Pretending():
    there = here.to(device)
    tries = {
        "add": lambda: there + here,
        "index": lambda: here[there.long()],
        "write": lambda: torch.zeros(()).add_(there.sum()),
        "numpy": lambda: there.numpy(),
        "draw": lambda: torch.randn(3, generator=torch.Generator(), device=device),
    }
    for name, call in tries.items():
        try:
            call()
        except (RuntimeError, TypeError):
            print(name)
    print(float((there * 2 + torch.tensor(1.0))[torch.tensor([0, 2])].sum()))
"""


@needs_python_devices
def test_the_device_refuses_what_cuda_refuses():
    assert run("-c", MEETING).stdout.split() == ["add", "index", "write", "numpy", "draw", "6.0"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so():
    done = run("benchmarks/gpu.py")
    assert done.returncode == 0, done.stderr
    assert '"verdict": "no gpu"' in done.stdout.splitlines()[-1]
