"""What a run ran on: versions, processor and date, so that a record can be told from another."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fedmerge

__all__ = ["describe_environment", "processor"]


def processor() -> str:
    """The processor's name, as the system tells it.

    Examples
    --------
    >>> processor() != ""
    True
    """
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
        if name:
            return name
    return platform.processor() or platform.machine()


def describe_environment() -> dict[str, Any]:
    """Versions, processor, vector instructions and the time now, in UTC.

    Examples
    --------
    >>> sorted(describe_environment())[:4]
    ['cores', 'cpu_capability', 'date', 'fedmerge']
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "fedmerge": fedmerge.__version__,
        "torch": torch.__version__,
        "flwr": _installed("flwr"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
