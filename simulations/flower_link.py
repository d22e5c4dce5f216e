"""A SuperLink and its SuperNodes as processes of this machine, and runs submitted to them."""

from __future__ import annotations

import ssl
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flower_keys import make_keys, make_supernode_key
from flower_processes import (
    COMPLETED,
    ENDED,
    copy_app,
    find_command,
    free_ports,
    json_of,
    last_lines,
    make_environment,
    run_settings,
)

CONNECTION = "deployment"
_STRANGER = "stranger"
_REFUSAL = "Failed to activate SuperNode"  # what the SuperLink of flwr 1.41 answers to a key that it does not know


class DeploymentError(Exception):
    """The deployment cannot go on, and why."""


@dataclass
class Deployment:
    """What runs on the loopback interface; whoever made the Flower home ends it.

    Parameters
    ----------
    home
        An empty folder; everything lives below it.
    secure
        Whether there are TLS and SuperNode authentication.
    deadline
        By the monotonic clock; nothing is waited for longer.
    """

    home: Path
    secure: bool
    deadline: float
    address: str = ""
    servers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def keys(self) -> Path:
        """Folder of keys and certificates."""
        return self.home / "keys"

    def start_superlink(self, supernodes: int) -> None:
        """Start it, wait until it answers, and register the SuperNodes' keys.

        Raises
        ------
        DeploymentError
            It ends or does not answer, or refuses a key.
        """
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        if self.secure:
            make_keys(self.keys, supernodes)
        security = [*self._certificates("server"), "--enable-supernode-auth"] if self.secure else ["--insecure"]
        self._start(
            "superlink",
            ["flower-superlink", *security, "--host", "127.0.0.1", "--port", str(port)],
            ["--database", "state.db", "--disable-runtime-dependency-installation"],
        )
        trust = f'root-certificates = "{self.keys / "ca.crt"}"' if self.secure else "insecure = true"
        (self.home / "config.toml").write_text(f'[superlink.{CONNECTION}]\naddress = "{self.address}"\n{trust}\n')
        self._wait_for_superlink()
        for number in range(supernodes if self.secure else 0):
            key = self.keys / f"supernode-{number}.pub"
            done = self._flwr("supernode", "register", str(key), CONNECTION)
            if done.returncode:
                raise DeploymentError(f"the SuperLink did not take {key.name}: {done.stdout}{done.stderr}")

    def start_supernodes(self, number: int) -> None:
        """Start a SuperNode for each partition."""
        for partition, port in enumerate(free_ports(number)):
            self._start_supernode(f"supernode-{partition}", port, f"partition-id={partition} num-partitions={number}")

    def check_stranger_is_refused(self, patience: float = 120) -> None:
        """Start a SuperNode whose key nobody registered.

        Raises
        ------
        DeploymentError
            It is still there after `patience` seconds, it is among those online, or it ended for
            another reason than its key.
        """
        make_supernode_key(self.keys / _STRANGER)
        self._start_supernode(_STRANGER, *free_ports(1), "partition-id=0 num-partitions=1")
        process = self.servers.pop(_STRANGER)
        until = min(time.monotonic() + patience, self.deadline)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.5)
        log = last_lines(self._log(_STRANGER))
        online = [node for node in self._supernodes() if node.get("status") == "online"]
        if process.poll() is None or online:
            raise DeploymentError(f"the unregistered SuperNode was NOT refused; its log:\n{log}")
        if process.returncode == 0 or _REFUSAL not in log:
            raise DeploymentError(f"the unregistered SuperNode ended, but not for its key; its log:\n{log}")

    def run_app(self, values: dict[str, Any]) -> str | None:
        """Submit the app with these settings, show its log while it runs, and return what went wrong.

        Raises
        ------
        DeploymentError
            A server ended, or the time is over.
        """
        app = self.home / "flower-app"
        if not app.exists():
            copy_app(self.home)
        submitted = self._flwr("run", str(app), CONNECTION, "--run-config", run_settings(values), "--format", "json")
        run = str(json_of(submitted.stdout).get("run-id", ""))
        if not run:
            return f"the SuperLink did not take it: {submitted.stdout}{submitted.stderr}"
        command = [find_command("flwr") or "flwr", "log", run, CONNECTION, "--stream"]
        with subprocess.Popen(command, cwd=self._folder("submit"), env=make_environment(self.home)) as log:
            try:
                while log.poll() is None:
                    self._check()
                    time.sleep(0.5)
            finally:
                log.terminate()
        # The log ends a moment before the run does.
        while True:
            listing = self._flwr("list", CONNECTION, "--run-id", run, "--format", "json")
            status = (json_of(listing.stdout).get("runs") or [{}])[0]
            if str(status.get("status", "")).startswith(ENDED):
                break
            self._check()
            time.sleep(1)
        if status["status"] == COMPLETED:
            return None
        return f"the run ended as {status['status']!r} ({status.get('status-details') or 'no details'})"

    def _start_supernode(self, name: str, port: int, node_config: str) -> None:
        security = ["--insecure"]
        if self.secure:
            trust = ["--root-certificates", str(self.keys / "ca.crt")]
            own = self._certificates("supernode-0" if name == _STRANGER else name)
            security = [*trust, *own, "--auth-supernode-private-key", str(self.keys / name)]
        self._start(
            name,
            ["flower-supernode", *security, "--superlink", self.address, "--host", "127.0.0.1", "--port", str(port)],
            ["--node-config", node_config],
        )

    def _certificates(self, name: str) -> list[str]:
        """Those of a server: of the SuperLink, or of a SuperNode towards its own processes."""
        files = {"ca-certfile": "ca.crt", "certfile": f"{name}.pem", "keyfile": f"{name}.key"}
        return [part for option, file in files.items() for part in (f"--ssl-{option}", str(self.keys / file))]

    def _start(self, name: str, command: list[str], more: list[str]) -> None:
        # Each in an empty folder and with a Flower home of its own, as on machines of their own: what lies in the
        # folder would be imported before the app's code.
        folder = self._folder(name)
        command[0] = find_command(command[0]) or command[0]
        with self._log(name).open("wb") as log:
            self.servers[name] = subprocess.Popen(
                [*command, *more],
                cwd=folder,
                env=make_environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the script, which ends them in order
            )

    def _folder(self, name: str) -> Path:
        folder = self.home / name
        folder.mkdir(exist_ok=True)
        return folder

    def _log(self, name: str) -> Path:
        return self.home / f"{name}.log"

    def _flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [find_command("flwr") or "flwr", *arguments]
        left = max(1.0, self.deadline - time.monotonic())
        try:
            return subprocess.run(
                command,
                cwd=self._folder("submit"),
                env=make_environment(self.home),
                capture_output=True,
                text=True,
                check=False,
                timeout=left,
            )
        except subprocess.TimeoutExpired as error:
            raise DeploymentError(f"`flwr {arguments[0]}` did not end in time") from error

    def _supernodes(self) -> list[dict[str, Any]]:
        return list(json_of(self._flwr("supernode", "list", CONNECTION, "--format", "json").stdout).get("nodes", []))

    def _wait_for_superlink(self) -> None:
        context = ssl.create_default_context(cafile=str(self.keys / "ca.crt")) if self.secure else None
        handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)]
        url = f"http{'s' if self.secure else ''}://{self.address}/health"
        while True:
            try:
                with urllib.request.build_opener(*handlers).open(url, timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                self._check()
                time.sleep(0.2)

    def _check(self) -> None:
        """Make sure that all servers are there, and that there is time left."""
        for name, process in self.servers.items():
            if process.poll() is not None:
                log = last_lines(self._log(name))
                raise DeploymentError(f"{name} ended with exit code {process.returncode}; its log:\n{log}")
        if time.monotonic() > self.deadline:
            raise DeploymentError("still running at the end of --timeout; it was given up")
