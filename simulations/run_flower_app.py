"""Run one method of a configuration through `flwr run`, on Flower's own Ray simulation, the safe way.

    python simulations/run_flower_app.py simulations/demo.toml --method fednova --out runs/flower

Flower's local daemons outlive the command that starts them, reuse whatever listens on their port, import the client
from the folder they were started in, and install dependencies for every run. So this gives them a home, a port and a
folder of their own, switches the installation off, takes its verdict from the run's status rather than from the
exit code (which is 0 even for a failed run), and ends the daemons with everything they started.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedmerge.errors import FedMergeError
from fedmerge.records import write_toml
from fedmerge.simulation import Config, Experiment, load_config, make_config
from fedmerge.simulation.compare import check_output, run_folder

APP = Path(__file__).parent / "flower-app"
ENDED = "finished"
NOT_SUBMITTED = "not submitted"


def main() -> int:
    arguments = _arguments()
    # Ended by a CI system or a service manager, it still ends its daemons: `finally` runs on an exception only.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        config = _config(arguments)
        check_output(config, arguments.out)
        clients = Experiment(config, arguments.seed).num_clients
    except FedMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    flwr = shutil.which("flwr", path=_path())
    if flwr is None or importlib.util.find_spec("ray") is None:
        print('error: Flower\'s simulation is missing: pip install "fedmerge[sim]"', file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="flower-") as scratch:
        home = Path(scratch)
        environment = _environment(home)
        try:
            status = _run(flwr, home, environment, config, arguments, clients)
        finally:
            _end(home)
    record = run_folder(arguments.out, arguments.method, arguments.seed)
    if status != "finished:completed" or not record.is_dir():
        print(f"error: the run ended as {status!r}; its log is above", file=sys.stderr)
        return 1
    print(record)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=lambda text: Path(text).absolute(), metavar="CONFIG.toml")
    parser.add_argument("--method", default="fedavg")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=lambda text: Path(text).absolute(), required=True)
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted run left in --out")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds until the run is given up")
    return parser.parse_args()


def _config(arguments: argparse.Namespace) -> Config:
    """The configuration of this one run; its data folder absolute, for the daemons work in another folder."""
    layers = [load_config(arguments.config), {"methods": [arguments.method], "seeds": [arguments.seed]}]
    folder = make_config(*layers).data.dir
    if folder is not None:
        layers.append({"data": {"dir": str(folder.expanduser().absolute())}})
    return make_config(*layers)


def _path() -> str:
    """Where to find Flower's commands, which call each other by name: beside this Python first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _environment(home: Path) -> dict[str, str]:
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
        ports = first.getsockname()[1], second.getsockname()[1]
    data = os.environ.get("FEDMERGE_DATA")
    return os.environ | {
        **({"FEDMERGE_DATA": str(Path(data).expanduser().absolute())} if data else {}),
        "PATH": _path(),
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports[0]),
        "FLWR_LOCAL_CONTROL_API_PORT": str(ports[1]),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _run(
    flwr: str, home: Path, environment: dict[str, str], config: Config, arguments: argparse.Namespace, clients: int
) -> str:
    """Submit the app, show its log while it runs, and return the status that it ended with."""
    # The daemons start in an empty folder: what lies in their folder comes before the app's own code.
    neutral = home / "neutral"
    neutral.mkdir()
    app = home / "flower-app"
    shutil.copytree(APP, app, ignore=shutil.ignore_patterns("__pycache__"))
    settings = home / "fedmerge.toml"
    write_toml(settings, config.model_dump(mode="json"))
    values = {"config": str(settings), "method": config.methods[0], "out": str(arguments.out)}
    numbers = {"seed": config.seeds[0], "resume": arguments.resume}
    run_config = " ".join(f"{key}={json.dumps(value)}" for key, value in {**values, **numbers}.items())
    simulation = f"num-supernodes={clients} client-resources-num-cpus=1"
    command = [flwr, "run", str(app), "--run-config", run_config, "--federation-config", simulation, "--stream"]
    deadline = time.monotonic() + arguments.timeout
    try:
        subprocess.run(command, cwd=neutral, env=environment, check=False, timeout=arguments.timeout)
    except subprocess.TimeoutExpired:
        return f"still running after {arguments.timeout:g} s"
    # The log ends a moment before the run does.
    status = _status(flwr, neutral, environment)
    while not status.startswith(ENDED) and status != NOT_SUBMITTED and time.monotonic() < deadline:
        time.sleep(1)
        status = _status(flwr, neutral, environment)
    log = home / "local-superlink" / "superlink.log"
    if status == NOT_SUBMITTED and log.exists():
        print("\n".join(log.read_text(errors="replace").splitlines()[-40:]), file=sys.stderr)
    return status


def _status(flwr: str, neutral: Path, environment: dict[str, str]) -> str:
    """Status of the run: this Flower home has had no other."""
    command = [flwr, "list", "--format", "json"]
    listing = subprocess.run(command, cwd=neutral, env=environment, capture_output=True, text=True, check=False).stdout
    try:
        return str(json.loads(listing[listing.index("{") :])["runs"][0]["status"])
    except (ValueError, KeyError, IndexError):
        return NOT_SUBMITTED


def _end(home: Path) -> None:
    """End the daemons and all that they started: every process that lives in this Flower home."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for process in _processes(home):
            try:
                os.kill(process, sign)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + 10
        while _processes(home) and time.monotonic() < deadline:
            time.sleep(0.2)


def _processes(home: Path) -> list[int]:
    """Ids of processes that were started with this Flower home, by what `ps` shows of their environment."""
    shown = subprocess.run(["ps", "axeww", "-o", "pid=,command="], capture_output=True, text=True, check=True).stdout
    mark = f"FLWR_HOME={home}"
    found = [int(line.split(None, 1)[0]) for line in shown.splitlines() if mark in line]
    return [process for process in found if process != os.getpid()]


if __name__ == "__main__":
    sys.exit(main())
