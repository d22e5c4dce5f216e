"""Flower's commands in a home of their own: where to find them, what they must know, and how to end what they start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

APP = Path(__file__).parent / "flower-app"
COMPLETED = "finished:completed"
ENDED = "finished"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def find_command(name: str) -> str | None:
    """One of Flower's commands: that of this Python first."""
    return shutil.which(name, path=_path())


def _path() -> str:
    """Flower's commands call each other by name: beside this Python first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def make_environment(home: Path, **more: str) -> dict[str, str]:
    """Environment of a command in this Flower home, without telemetry, update check and installations."""
    data = os.environ.get("FEDMERGE_DATA")
    return os.environ | {
        **({"FEDMERGE_DATA": str(Path(data).expanduser().absolute())} if data else {}),
        "PATH": _path(),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        **more,
    }


def free_ports(number: int) -> list[int]:
    """Different ports of the loopback interface on which nothing listens now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def flower_home() -> Iterator[Path]:
    """A new Flower home; whatever was started in it ends with the block, also where a signal ends this process."""
    # Ended by a CI system, a service manager or a closed terminal it still ends its processes: `finally` runs on an
    # exception only.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    with tempfile.TemporaryDirectory(prefix="flower-") as scratch:
        home = Path(scratch)
        try:
            yield home
        finally:
            end(home)


def copy_app(home: Path) -> Path:
    """The Flower app in a folder of its own, whose name Flower accepts and in which nothing else lies."""
    app = home / "flower-app"
    shutil.copytree(APP, app, ignore=shutil.ignore_patterns("__pycache__"))
    return app


def run_settings(values: dict[str, Any]) -> str:
    """Values as ``--run-config`` takes them."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


def json_of(output: str) -> dict[str, Any]:
    """What a command printed with ``--format json``, whatever it logged before; empty where it printed none."""
    try:
        return dict(json.loads(output[output.index("{") :]))
    except ValueError:
        return {}


def last_lines(log: Path, number: int = 40) -> str:
    """The end of a log, as far as there is one."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-number:]) if log.exists() else ""


def end(home: Path) -> None:
    """End every process that lives in this Flower home, and let no further signal interrupt that."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for process in processes(home):
                try:
                    os.kill(process, sign)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + 10
            while processes(home) and time.monotonic() < deadline:
                time.sleep(0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def processes(home: Path) -> list[int]:
    """Ids of processes that were started with this Flower home, by what `ps` shows of their environment."""
    shown = subprocess.run(["ps", "axeww", "-o", "pid=,command="], capture_output=True, text=True, check=True).stdout
    mark = f"FLWR_HOME={home}"
    numbers = [int(line.split(None, 1)[0]) for line in shown.splitlines() if mark in line]
    return [process for process in numbers if process != os.getpid()]
