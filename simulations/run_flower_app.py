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
import subprocess
import sys
import time
from pathlib import Path

from flower_processes import (
    COMPLETED,
    ENDED,
    copy_app,
    find_command,
    flower_home,
    free_ports,
    json_of,
    last_lines,
    make_environment,
    run_settings,
)

from fedmerge.errors import FedMergeError
from fedmerge.records.run_records import write_toml
from fedmerge.simulation import Config, Experiment, load_config, make_config
from fedmerge.simulation.runs.compare import check_output, run_folder

NOT_SUBMITTED = "not submitted"


def main() -> int:
    arguments = _arguments()
    try:
        config = _config(arguments)
        check_output(config, arguments.out)
        clients = Experiment(config, arguments.seed).num_clients
    except FedMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    flwr = find_command("flwr")
    if flwr is None or importlib.util.find_spec("ray") is None:
        print('error: Flower\'s simulation is missing: pip install "fedmerge[sim]"', file=sys.stderr)
        return 2
    with flower_home() as home:
        api, control = free_ports(2)
        ports = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(api), "FLWR_LOCAL_CONTROL_API_PORT": str(control)}
        status = _run(flwr, home, make_environment(home, **ports), config, arguments, clients)
    record = run_folder(arguments.out, arguments.method, arguments.seed)
    if status != COMPLETED or not record.is_dir():
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


def _run(
    flwr: str, home: Path, environment: dict[str, str], config: Config, arguments: argparse.Namespace, clients: int
) -> str:
    """Submit the app, show its log while it runs, and return the status that it ended with."""
    # The daemons start in an empty folder: what lies in their folder comes before the app's own code.
    neutral = home / "neutral"
    neutral.mkdir()
    app = copy_app(home)
    settings = home / "fedmerge.toml"
    write_toml(settings, config.model_dump(mode="json"))
    values = {"config": str(settings), "method": config.methods[0], "out": str(arguments.out)}
    numbers = {"seed": config.seeds[0], "resume": arguments.resume}
    run_config = run_settings({**values, **numbers})
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
    if status == NOT_SUBMITTED:
        print(last_lines(log), file=sys.stderr)
    return status


def _status(flwr: str, neutral: Path, environment: dict[str, str]) -> str:
    """Status of the run: this Flower home has had no other."""
    command = [flwr, "list", "--format", "json"]
    listing = subprocess.run(command, cwd=neutral, env=environment, capture_output=True, text=True, check=False).stdout
    runs = json_of(listing).get("runs") or [{}]
    return str(runs[0].get("status", NOT_SUBMITTED))


if __name__ == "__main__":
    sys.exit(main())
