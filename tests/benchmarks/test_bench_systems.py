"""All systems do the same arithmetic, and known clients cost nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from benchmarks.rounds import WORKLOADS, Task, Workload
from benchmarks.rounds.child import find_system
from benchmarks.rounds.examples import ClientRows, load_examples
from fedmerge.data import ClientData

MLP = Workload("mlp", "digits", 40, 6, 21, "dealt", (12,), 8, 0.1, 2)
LAZY = Workload("lazy", "digits", 1_000_000, 5, 20, "drawn", (8,), 10, 0.1, 2)
CNN = Workload("cnn", "digits", 4, 4, 60, "dirichlet", (16,), 16, 0.05, 2, channels=(4,))


def states(system: str, task: Task):
    """The global model when ready and after each round."""
    found = []
    find_system(system)(task, lambda round, state, engine: found.append((round, dict(state()))))
    assert [round for round, _ in found] == list(range(task.rounds + 1))
    return [state for _, state in found]


@pytest.mark.parametrize("workload", [MLP, LAZY, CNN], ids=lambda workload: workload.name)
@pytest.mark.parametrize("system", ["stacked", "fedmerge"])
def test_systems_give_the_loops_model_in_every_round(workload, system):
    task = Task(workload, rounds=2)
    for ours, loops in zip(states(system, task), states("loop", task), strict=True):
        assert ours.keys() == loops.keys()
        for name, tensor in loops.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


def test_rounds_change_the_model_and_teach_it_something():
    task = Task(MLP, rounds=6)
    first, *_, last = states("loop", task)
    assert task.accuracy(last) > task.accuracy(first) + 0.1


@dataclass
class Counting:
    """A data function that notes who was asked for."""

    inner: ClientRows
    asked: list[int] = field(default_factory=list)

    def __call__(self, partition_id: int, num_partitions: int) -> ClientData:
        self.asked.append(partition_id)
        return self.inner(partition_id, num_partitions)


@pytest.mark.parametrize("system", ["loop", "stacked", "fedmerge"])
def test_of_a_million_known_clients_only_sampled_ones_are_asked_for_data(system):
    task = Task(LAZY, rounds=2)
    counting = Counting(task.data_fn)
    task.__dict__["data_fn"] = counting  # where the cached property keeps it
    states(system, task)
    assert set(counting.asked) == {*task.sampled(1), *task.sampled(2)}
    assert len(counting.asked) <= 3 * 2 * LAZY.sampled  # fedmerge tries its engines on a few first


def test_both_sizes_of_w3_give_a_client_the_same_rows():
    small, large = WORKLOADS["W3"], WORKLOADS["W3-million"]
    assert (small.clients, large.clients) == (10_000, 1_000_000)
    digits = {"dataset": "digits"}
    one, other = (ClientRows(Workload(**{**w.__dict__, **digits, "name": "x"}), None, 0, "cpu") for w in (small, large))
    assert torch.equal(one(9_999, 10_000).train_x, other(9_999, 1_000_000).train_x)
    assert len(other(999_999, 1_000_000)) == 20


def test_label_skew_deals_every_example_at_most_once():
    data, task = load_examples("digits", None), Task(Workload(**{**CNN.__dict__, "examples": 10_000}), rounds=2)
    held = [task.data_fn(client, 4) for client in range(4)]
    assert sum(map(len, held)) == len(data.train_y)
    counts = torch.stack([torch.bincount(client.train_y, minlength=10) for client in held])
    assert torch.equal(counts.sum(0), torch.bincount(data.train_y))
    shares = counts / counts.sum(1, keepdim=True)
    assert (shares.max(0).values - shares.min(0).values).max() > 0.1


def test_dealt_clients_share_no_example():
    task = Task(MLP, rounds=2)
    rows = torch.cat([task.data_fn(client, 40).train_x for client in range(40)]).flatten(1)
    assert len(rows) == 40 * 21
    assert len(rows.unique(dim=0)) == len(rows)  # no two of the digits are alike


def test_examples_are_made_up_where_there_are_none(tmp_path):
    load_examples.cache_clear()
    data = load_examples("mnist", tmp_path)
    load_examples.cache_clear()
    assert data.name == "synthetic"
    assert (data.input_shape, len(data.train_x), len(data.test_x)) == ((1, 28, 28), 60_000, 10_000)
    assert list(tmp_path.iterdir()) == []  # nothing was downloaded
