"""Checks and measures fedmerge on this machine's GPU, without a package index.

    python benchmarks/gpu.py [--wheels DIR] [--data-dir DIR] [--only WORD ...] [--skip-speed] [--seconds 450]

Makes importable what is missing, from wheels in DIR (or in ``wheels`` beside this script) and into a temporary folder;
runs the checks of tests/gpu, which pytest runs as those marked ``gpu``; then times W1 and W2 of ``fedmerge bench`` one
client after the other and stacked, data resident. JSON lines on stdout, the last one the verdict. Exits with 1 where
something failed, with 0 where nothing did or there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROUNDS = {"W1": 8, "W2": 4}
CHECK_SECONDS, SPEED_SECONDS, SYSTEM_SECONDS = 60, 60, 90  # of one check, kept for the speed part, of one system
APART = 0.03  # accuracies of engines that draw the same batches, after a few rounds with TF32
OK, FAILED, SKIPPED = "ok", "failed", "skipped"


class OutOfTime(BaseException):
    """A part has used up its time; no ``except Exception`` on the way stops it."""


def main() -> int:
    arguments = _arguments()
    started = time.monotonic()
    try:
        import torch
    except ImportError:
        return _verdict("no gpu", "torch is not installed: nothing was run", Counter(), started)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return _verdict("no gpu", f"torch {torch.__version__} sees no CUDA device: nothing was run", Counter(), started)
    folder = Path(tempfile.mkdtemp(prefix="fedmerge-gpu-"))
    try:
        provide(_wheels(arguments.wheels), folder)
        return _all_parts(arguments, started)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _all_parts(arguments: argparse.Namespace, started: float) -> int:
    for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "RAY_USAGE_STATS_ENABLED"):
        os.environ.setdefault(name, "1" if "DISABLE" in name else "0")
    sys.path.insert(0, str(HERE.parent))
    deadline = started + arguments.seconds
    counts: Counter[str] = Counter()
    _print(_machine(arguments.device))
    for rows in (
        _checks(arguments, deadline - (0 if arguments.skip_speed else 2 * SPEED_SECONDS)),
        () if arguments.skip_speed else _speed(arguments, deadline),
        [_mixed_precision()],
    ):
        try:
            for row in rows:
                counts[row["verdict"]] += 1
                _print(row)
        except Exception as error:  # such as a package that is missing: the other parts go on
            counts[FAILED] += 1
            _print({"part": "script", "verdict": FAILED, "reason": f"{type(error).__name__}: {error}"})
    words = f"{counts[OK]} ok, {counts[FAILED]} failed, {counts[SKIPPED]} skipped on {_device_name(arguments.device)}"
    verdict = FAILED if counts[FAILED] else "incomplete" if counts[SKIPPED] else "passed"
    return _verdict(verdict, words, counts, started)


def provide(wheels: Path | None, folder: Path) -> None:
    """Make importable what is not installed, from `wheels` and into `folder`; each step is told on standard error."""
    if wheels is None:
        return
    missing = [path for path in sorted(wheels.glob("*.whl")) if not _installed(path.name.partition("-")[0])]
    if not missing:
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(folder)]
    # All at once where all fit; a wheel for another Python would keep the others out.
    if subprocess.run([*command, *map(str, missing)], check=False, capture_output=True).returncode:
        for path in missing:
            done = subprocess.run([*command, str(path)], check=False, capture_output=True, text=True)
            if done.returncode:
                _tell(f"{path.name} is not installed: {done.stderr.strip().splitlines()[-1:]}")
    sys.path.append(str(folder))  # behind what is installed
    importlib.invalidate_caches()
    _tell(f"taken from {wheels}: {', '.join(path.name.partition('-')[0] for path in missing)}")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _wheels(named: Path | None) -> Path | None:
    if named is not None:
        if not named.is_dir():
            sys.exit(f"--wheels {named} is no folder")
        return named
    places = (place / "wheels" for place in (HERE, HERE.parent, HERE.parent.parent))
    return next((place for place in places if place.is_dir()), None)


def _checks(arguments: argparse.Namespace, deadline: float) -> Iterator[dict[str, Any]]:
    import torch

    from tests.gpu.checks import CHECKS
    from tests.gpu.running import run_check

    device = torch.device(arguments.device)
    for check in CHECKS:
        if arguments.only and not any(word in check.name for word in arguments.only):
            continue
        row: dict[str, Any] = {"part": "checks", "check": check.name}
        if time.monotonic() > deadline:
            yield {**row, "verdict": SKIPPED, "reason": "no time left"}
            continue
        try:
            with _at_most(CHECK_SECONDS):
                row |= run_check(check, device)
        except OutOfTime:
            row |= {"verdict": FAILED, "reason": f"it took more than {CHECK_SECONDS} s"}
        yield row


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime after a while."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _speed(arguments: argparse.Namespace, deadline: float) -> Iterator[dict[str, Any]]:
    from benchmarks.rounds import loop, ours
    from benchmarks.rounds.task import Task
    from benchmarks.rounds.workloads import find_workload

    systems: dict[str, Callable[..., None]] = {
        "plain loop": loop.run,
        "serial": partial(ours.run, engine="serial"),
        "stacked": partial(ours.run, engine="stacked"),
    }
    for name, rounds in ROUNDS.items():
        task = Task(find_workload(name), rounds, 0, arguments.data_dir, device=arguments.device)
        rows: dict[str, dict[str, Any]] = {}
        for system, run in systems.items():
            row = {"part": "speed", "workload": name, "system": system}
            left = min(SYSTEM_SECONDS, deadline - time.monotonic())
            if left < 5:
                yield {**row, "verdict": SKIPPED, "reason": "no time left"}
                continue
            try:
                rows[system] = row | _timed(task, run, time.monotonic() + left)
            except Exception as error:
                row |= {"verdict": FAILED, "reason": f"{type(error).__name__}: {str(error)[:300]}"}
            yield rows.get(system, row)
        if "serial" in rows and "stacked" in rows:
            yield _compared(name, rows["serial"], rows["stacked"])


def _compared(name: str, serial: dict[str, Any], stacked: dict[str, Any]) -> dict[str, Any]:
    row = {"part": "speed", "workload": name, "what": "stacked over serial"}
    row["wall_ratio"] = round(stacked["ms_per_client"] / serial["ms_per_client"], 3)
    if serial["rounds"] != stacked["rounds"] or stacked["engine"] != "stacked":
        return {**row, "verdict": SKIPPED, "reason": "not the same rounds, or not stacked: nothing to compare"}
    apart = abs(serial["accuracy"] - stacked["accuracy"])
    return {**row, "accuracies_apart": round(apart, 4), "verdict": OK if apart <= APART else FAILED}


def _timed(task: Any, run: Callable[..., None], deadline: float) -> dict[str, Any]:
    """Run a system; milliseconds a client are medians over all rounds but the first."""
    import torch

    cuda = task.device == "cuda"
    marks: list[float] = []
    last: dict[str, Any] = {}

    def pause(round: int, state: Callable[[], Any], engine: str) -> None:
        if cuda:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        over = time.monotonic() > deadline
        if round >= 2 and (over or round == task.rounds):
            last.update(engine=engine, rounds=round, state=state())
        if over:
            raise OutOfTime
        marks[-1] = time.perf_counter()

    task.model()  # loads the data, so that neither time nor peak counts how
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    try:
        run(task, pause)
    except OutOfTime:
        if not last:
            return {"verdict": SKIPPED, "reason": "two rounds did not fit into its time", "ms_per_client": float("nan")}
    row: dict[str, Any] = {"verdict": OK, "engine": last["engine"], "rounds": last["rounds"], "data": task.data.name}
    walls = [after - first for first, after in pairwise(marks)][1:]
    row["ms_per_client"] = round(1000 * statistics.median(walls) / task.workload.sampled, 4)
    if cuda:
        row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        row["resident_mib"] = round(before / 2**20, 1)
    row["accuracy"] = round(task.accuracy({n: t.to(task.device) for n, t in last["state"].items()}), 4)
    return row


def _mixed_precision() -> dict[str, Any]:
    from dataclasses import fields

    from fedmerge.training import LocalTraining

    names = [field.name for field in fields(LocalTraining) if "precision" in field.name or "autocast" in field.name]
    message = f"there are settings that this script does not measure: {names}" if names else "fedmerge has none"
    return {"part": "mixed precision", "verdict": "none", "reason": message}


def _machine(device: str) -> dict[str, Any]:
    import torch

    row: dict[str, Any] = {"part": "machine", "device": _device_name(device), "python": platform.python_version()}
    row |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    if device == "cuda":
        row["memory_mib"] = round(torch.cuda.mem_get_info()[1] / 2**20)
        row["tf32_products"] = torch.backends.cuda.matmul.allow_tf32
        row["tf32_convolutions"] = torch.backends.cudnn.allow_tf32
    for package in ("flwr", "ray", "torchvision", "pytest"):
        row[package] = importlib.metadata.version(package) if _installed(package) else None
    return row


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


def _verdict(verdict: str, words: str, counts: Counter[str], started: float) -> int:
    row = {"part": "verdict", "verdict": verdict, "summary": words}
    row |= {name: counts[name] for name in (OK, FAILED, SKIPPED)}
    _print(row | {"seconds": round(time.monotonic() - started, 1)})
    return 1 if verdict == FAILED else 0


def _print(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what is not installed")
    parser.add_argument("--data-dir", type=Path, help="of MNIST and Fashion-MNIST; else FEDMERGE_DATA, or made up")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="checks with one of these in their name")
    parser.add_argument("--skip-speed", action="store_true", help="checks alone")
    parser.add_argument("--seconds", type=float, default=450, help="for everything")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the script itself")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
