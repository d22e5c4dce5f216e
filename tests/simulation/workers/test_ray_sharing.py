"""Several grids on one Ray: they share processors, modules and the session, and none waits for ever."""

from __future__ import annotations

import sys
import threading
import types

import pytest
import torch

from fedmerge.errors import ConfigError, FedMergeError, NoUsableUpdates
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import FedAvg, client_app, from_arrays
from tests.federation import TRAINING, initial, plain_model

MODULE = """
from tests.federation import plain_model, tiny_data
def make(): return plain_model()
def data(client, total): return tiny_data(client, total)
"""


class CannotStart:
    """An actor whose process is none."""

    def __init__(self):
        self.one = 1 / 0

    def ping(self):
        """Answer."""


def train(grid):
    return from_arrays(FedAvg(fraction_evaluate=0.0).start(grid, initial(plain_model), num_rounds=1).arrays)


@pytest.fixture
def ended():
    """Ray, ended after the test whatever became of it."""
    ray = pytest.importorskip("ray")
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_two_threads_share_processors_modules_and_ray(ended, tmp_path, monkeypatch, caplog):
    """Each wants the only processor; modules lie where only this process looks, by a path added late, and relative."""
    from fedmerge.simulation.workers.ray_pool import Pool
    from fedmerge.simulation.workers.ray_workers import RayWorkers

    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "task_beside.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, "beside"])
    import task_beside

    absent = types.ModuleType("nowhere_on_disk")
    exec(MODULE, vars(absent))
    absent.make.__module__ = absent.data.__module__ = absent.__name__
    monkeypatch.setitem(sys.modules, absent.__name__, absent)

    started, closed, found, problems = threading.Barrier(2), threading.Event(), {}, []

    def simulate(number):
        try:
            workers = RayWorkers(1, engine="serial")
            started.wait(timeout=120)
            if number:
                closed.wait(timeout=200)  # the other ends first, be it the one that started Ray or not
            app = client_app(task_beside.make, task_beside.data, training=TRAINING)
            found[number] = train(SimulationGrid(app, 3, workers=workers))
            if not number:
                grid = SimulationGrid(client_app(absent.make, absent.data), 3, workers=workers)
                with pytest.raises(NoUsableUpdates) as told:
                    train(grid)
                found["told"] = str(told.value)
                broken = [ended.remote(CannotStart).options(num_cpus=0, max_restarts=-1).remote()]
                with pytest.raises(FedMergeError, match=r"no worker on Ray can start.*ZeroDivisionError"):
                    next(Pool(broken).run([lambda worker: worker.ping.remote()]))
            workers.close()
            workers.close()  # once more, as somebody may who does not know
            closed.set()
        except BaseException as problem:
            problems.append(problem)
            started.abort()
            closed.set()

    threads = [threading.Thread(target=simulate, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
    assert problems == []
    assert "1 worker on Ray wants 1 processor, and of 1 processor only 0 processors are free" in caplog.text
    assert "client 0 failed: ModuleNotFoundError: No module named 'nowhere_on_disk'" in found["told"]
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name])
    assert not ended.is_initialized()


def test_gpus_that_others_hold_are_told_with_the_numbers(monkeypatch):
    places = pytest.importorskip("fedmerge.simulation.workers.ray_places")

    class Never:
        def wait(self, seconds):
            return False

    asked = []
    monkeypatch.setattr(places.ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    monkeypatch.setattr(places.ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(places, "placement_group", lambda each, strategy: asked.append(each) or Never())
    monkeypatch.setattr(places, "remove_placement_group", lambda group: None)
    words = "2 workers on Ray want 1 processor and 0.5 GPUs each, and of 4 processors and 1 GPUs only 1 processor is"
    with pytest.raises(ConfigError, match=words):
        places.Places(2)
    assert asked == [[{"CPU": 1.0, "GPU": 0.5}] * 2]
    monkeypatch.setattr(places.ray, "cluster_resources", lambda: {"CPU": 4.0})
    assert places.Places(6).options(0) == {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
    assert len(asked[-1]) == 6
