"""Run methods of a configuration on a real Flower deployment: a SuperLink and SuperNodes, a process each, on loopback.

    python simulations/deploy.py simulations/deploy.toml --methods fedavg,otfusion --check --stranger --out runs/deploy

Makes keys and certificates, starts a SuperLink with TLS and SuperNode authentication, registers the SuperNodes' public
keys, starts a SuperNode for each client, and submits the app of `run_flower_app.py`, unchanged, once for each method.
--check also runs every method in this process and compares the models; --stranger also starts a SuperNode that nobody
registered, which must be refused. The exit code is 0 only if every run completed and left its record, and every check
passed; 2 if nothing was started. Whatever it started ends with it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from flower_link import Deployment, DeploymentError
from flower_processes import find_command, flower_home

from fedmerge.errors import ConfigError, FedMergeError
from fedmerge.lookup.method_names import split_methods
from fedmerge.records.run_records import read_checkpoint, write_toml
from fedmerge.simulation import Config, Experiment, compare, load_config, make_config
from fedmerge.simulation.runs.compare import check_output, run_folder

TOLERANCE = 1e-5


def main() -> int:
    arguments = _arguments()
    try:
        config = _config(arguments)
        check_output(config, arguments.out)
        clients = Experiment(config, arguments.seed).num_clients
        if arguments.supernodes not in (None, clients):
            raise ConfigError(f"--supernodes {arguments.supernodes}, but the data divide among {clients} clients")
        if arguments.stranger and arguments.insecure:
            raise ConfigError("--stranger wants authentication, which --insecure leaves out: choose one")
        missing = [name for name in ("flwr", "flower-superlink", "flower-supernode") if find_command(name) is None]
        if missing:
            raise ConfigError(f"no command {missing[0]!r} beside {sys.executable} or on PATH: install flwr")
    except FedMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        with flower_home() as home:
            faults = _deploy(home, config, arguments, clients)
        if arguments.check and not faults:
            faults = _differing(config, arguments)
    except (DeploymentError, FedMergeError) as error:
        faults = [str(error)]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    absolute = lambda text: Path(text).absolute()  # noqa: E731
    parser.add_argument("config", type=absolute, metavar="CONFIG.toml")
    parser.add_argument("--methods", type=split_methods, metavar="A,B,C", help="default: those of the configuration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=absolute, required=True)
    parser.add_argument("--supernodes", type=int, metavar="K", help="default: the configuration's clients")
    parser.add_argument("--insecure", action="store_true", help="without TLS and without SuperNode authentication")
    parser.add_argument("--stranger", action="store_true", help="fail unless an unregistered SuperNode is refused")
    parser.add_argument("--check", action="store_true", help=f"fail if a simulation's model differs by > {TOLERANCE}")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds until the deployment is given up")
    return parser.parse_args()


def _config(arguments: argparse.Namespace) -> Config:
    """The configuration of these runs; its data folder absolute, for the servers work in another folder."""
    layers = [load_config(arguments.config), {"seeds": [arguments.seed]}]
    if arguments.methods is not None:
        layers.append({"methods": arguments.methods})
    if arguments.supernodes is not None:
        layers.append({"partition": {"clients": arguments.supernodes}})
    folder = make_config(*layers).data.dir
    if folder is not None:
        layers.append({"data": {"dir": str(folder.expanduser().absolute())}})
    return make_config(*layers)


def _deploy(home: Path, config: Config, arguments: argparse.Namespace, clients: int) -> list[str]:
    """Run every method on one SuperLink, and return what went wrong."""
    settings = home / "fedmerge.toml"
    write_toml(settings, config.model_dump(mode="json"))
    deployment = Deployment(home, secure=not arguments.insecure, deadline=time.monotonic() + arguments.timeout)
    deployment.start_superlink(clients)
    if arguments.stranger:
        deployment.check_stranger_is_refused()
        print("the unregistered SuperNode was refused", flush=True)
    deployment.start_supernodes(clients)
    faults = []
    for method in config.methods:
        began = time.monotonic()
        verdict = deployment.run_app(
            {"config": str(settings), "method": method, "seed": arguments.seed, "out": str(arguments.out)}
        )
        record = run_folder(arguments.out, method, arguments.seed)
        if verdict is None and not record.is_dir():
            verdict = f"it completed and left no record in {record}"
        if verdict is not None:
            faults.append(f"{method}: {verdict}; its log is above")
            continue
        print(f"{record} ({time.monotonic() - began:.0f} s)", flush=True)
    return faults


def _differing(config: Config, arguments: argparse.Namespace) -> list[str]:
    """Simulate the same runs in this process, print how far the models lie apart, and return those too far."""
    faults = []
    with tempfile.TemporaryDirectory() as scratch:
        # Clients one after the other, as each SuperNode trains its own: stacked they sum in another order, and the
        # rounding of compressed statistics makes 1e-4 of that.
        alike = config.model_copy(update={"engine": "serial", "workers": 1})
        outcome = compare(alike, Path(scratch), lambda row: None)
        faults += [f"{failed.folder.name}: the simulation failed: {failed.error}" for failed in outcome.failed]
        for here in outcome.runs:
            difference = largest_difference(here, arguments.out / here.name)
            print(f"{here.name}: largest relative difference from the simulation {difference:.1e}", flush=True)
            if not difference <= TOLERANCE:
                faults.append(f"{here.name}: differs by {difference:.1e} from the simulation")
    return faults


def largest_difference(first: Path, other: Path) -> float:
    """Largest difference of two runs' final models, each tensor's relative to its largest value; inf for other shapes.

    The first is the one that is relied on.
    """
    ours, theirs = read_checkpoint(first)[1], read_checkpoint(other)[1]
    if {name: t.shape for name, t in ours.items()} != {name: t.shape for name, t in theirs.items()}:
        return float("inf")
    largest = 0.0
    for name, tensor in ours.items():
        if tensor.numel() == 0:
            continue
        scale = float(tensor.abs().max()) or 1.0
        difference = float((tensor.double() - theirs[name].double()).abs().max()) / scale
        largest = max(largest, difference) if difference == difference else float("nan")  # noqa: PLR0124 - NaN
    return largest


if __name__ == "__main__":
    sys.exit(main())
