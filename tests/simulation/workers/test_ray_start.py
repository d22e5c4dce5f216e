"""Ray that cannot be reached or started: an error in time, and no process of it left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from fedmerge.errors import WorkersUnavailable
from fedmerge.records.processes import children_of
from fedmerge.simulation import SimulationGrid, compare, make_config
from fedmerge.simulation.grids.simulation_grid import make_workers
from tests.federation import tiny_app

ray_start = pytest.importorskip("fedmerge.simulation.workers.ray_start")

CONFIG = {"methods": ["fedavg"], "rounds": 1, "partition": {"clients": 3}, "model": {"name": "logistic"}, "workers": 2}


@pytest.fixture(autouse=True)
def no_ray():
    """Other tests leave none behind."""
    import ray

    assert not ray.is_initialized()
    yield
    assert not ray.is_initialized()


def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    "form", ["127.0.0.1:{}", "localhost:{}", "ray://127.0.0.1:{}", "[::1]:{}", "no.such.host.invalid:{}"]
)
def test_a_cluster_where_nobody_listens_is_an_error_at_once_and_nothing_is_begun(form, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", form.format(unused_port()))
    began = time.monotonic()
    with pytest.raises(WorkersUnavailable, match=r"cannot be reached at .*, which RAY_ADDRESS names") as error:
        compare(make_config(CONFIG), tmp_path / "out", lambda row: None)
    assert "unset RAY_ADDRESS" in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 60
    assert not (tmp_path / "out").exists()


def test_a_name_that_nobody_knows_takes_no_longer(monkeypatch):
    monkeypatch.setattr(ray_start, "_REACH", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **named: time.sleep(60))
    monkeypatch.setenv("RAY_ADDRESS", "far.away:6379")
    began = time.monotonic()
    with pytest.raises(WorkersUnavailable, match=r"nothing is known of host 'far\.away' after 0\.2 s"):
        make_workers(2)
    assert time.monotonic() - began < 20


def test_all_of_it_is_over_within_a_minute_though_ray_does_not_end(monkeypatch):
    """Seconds that are spent count, and so does what ends the processes."""
    never_ends = SimpleNamespace(is_initialized=lambda: True, shutdown=lambda: time.sleep(60))
    monkeypatch.setattr(ray_start, "ray", never_ends)
    monkeypatch.setattr(ray_start, "_END", 0.2)
    began = time.monotonic()
    with pytest.raises(WorkersUnavailable, match=r"has not started within 0\.6 s"):
        ray_start.start_within(lambda: time.sleep(60), threading.Event(), spent=59.0)
    assert time.monotonic() - began < 20


def test_a_port_out_of_range_and_an_address_that_is_none_are_errors(monkeypatch):
    for address in ("127.0.0.1:99999", "nonsense"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(WorkersUnavailable):
            make_workers(2)


@pytest.mark.slow
def test_what_listens_and_is_no_ray_is_an_error_in_time(monkeypatch):
    monkeypatch.setattr(ray_start, "_ANSWER", 8.0)
    before = children_of(os.getpid())
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(WorkersUnavailable, match="does not answer as Ray does"):
            SimulationGrid(tiny_app(), 3, workers=2)
    assert children_of(os.getpid()) == before


def sleeper():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def begin(start, limit):
    over = threading.Event()
    try:
        ray_start.start_within(start, over, limit)
    finally:
        assert over.is_set() or sys.exc_info()[0] is None


@pytest.mark.parametrize("how", ["hangs", "raises", "exits", "dies with many lines", "its process dies"])
def test_ray_that_does_not_start_is_ended_with_all_that_it_started(how, monkeypatch):
    monkeypatch.setattr(ray_start, "_DEAD", 0.2)
    before, ended = children_of(os.getpid()), []

    def start():
        sleeper()
        if how == "its process dies":
            ended.append(subprocess.Popen([sys.executable, "-c", ""]))
        if how in ("hangs", "its process dies"):
            time.sleep(60)
        if how == "exits":
            sys.exit(1)
        raise RuntimeError("no room in /dev/shm\n  at line 3\n\x1b[31m" if "lines" in how else "no room in /dev/shm")

    told = {
        "hangs": "has not started within 0.5 s",
        "its process dies": "a process of it ended at once",
        "exits": "cannot be started: SystemExit",
    }
    began = time.monotonic()
    with pytest.raises(
        WorkersUnavailable, match=told.get(how, "cannot be started: RuntimeError: no room in /dev/shm")
    ) as e:
        begin(start, 0.5 if how == "hangs" else 30)
    assert "--workers 1" in str(e.value)
    assert time.monotonic() - began < 20
    assert children_of(os.getpid()) == before
    assert [process.wait() for process in ended] == [0] * len(ended)


def test_ctrl_c_while_ray_starts_ends_what_it_started():
    before = children_of(os.getpid())

    def start():
        sleeper()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            begin(start, 30)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert children_of(os.getpid()) == before


def test_what_sigterm_does_is_not_changed_by_ray():
    def handler(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, handler)
    try:
        begin(lambda: None, 5)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "error", [ImportError("libarrow.so: cannot open shared object"), OSError("bad ELF"), RuntimeError("x")]
)
def test_ray_that_is_damaged_is_told_apart_from_ray_that_is_missing(error, monkeypatch):
    import importlib.abc

    class Damaged(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "fedmerge.simulation.workers.ray_workers":
                raise error

    monkeypatch.delitem(sys.modules, "fedmerge.simulation.workers.ray_workers", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Damaged(), *sys.meta_path])
    with pytest.raises(WorkersUnavailable, match="Ray cannot be imported"):
        make_workers("ray")
