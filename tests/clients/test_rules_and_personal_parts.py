"""SCAFFOLD and FedDyn beside a few lines of torch, and personal parts, by every road: messages, serial, stacked."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmerge.data import ClientData
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.scenarios.attacks import SignFlip
from fedmerge.simulation.scenarios.faults import Faults, Mishaps
from fedmerge.simulation.scenarios.hostile_clients import Hostile
from fedmerge.simulation.workers.flower_task import FIRST_NODE
from fedmerge.strategies import MergeStrategy, client_app, from_arrays, to_arrays
from fedmerge.training import LocalTraining

CLIENTS, RATE, ALPHA = 5, 0.1, 0.2


class Messages(MergeStrategy):
    """One that wants a message for each client."""

    reads_messages = True


def net(norm: bool = True, frozen: bool = False):
    """A body, a norm and a head; with `frozen` the body stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body, head = nn.Linear(4, 6), nn.Linear(6, 3)
        made = nn.ModuleDict({"body": body, **({"norm": nn.BatchNorm1d(6)} if norm else {}), "head": head})
    body.requires_grad_(not frozen)
    return _Net(made)


class _Net(nn.Module):
    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        x = self.body(x)
        return self.head(torch.relu(self.norm(x) if hasattr(self, "norm") else x))


def plain_net():
    return net(norm=False)


def layered_net():
    """Nothing but linear layers, whose gradient is written by hand."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def frozen_net():
    return net(frozen=True)


def data(client, _total):
    draws = torch.Generator().manual_seed(client)
    n = 8 + 4 * client
    x, y = torch.randn(n + 4, 4, generator=draws), torch.randint(0, 3, (n + 4,), generator=draws)
    return ClientData(x[:n], y[:n], x[n:], y[n:])


def run(road, model_fn, method, rounds=3, fraction=1.0, training=None, batch_norm="mean", **client):
    """The last model, what each client keeps, who was merged in each round, and how many trained stacked."""
    strategy = (Messages if road == "messages" else MergeStrategy)(
        method, model_fn=model_fn, fraction_train=fraction, fraction_evaluate=0.0, batch_norm=batch_norm,
        personal=client.get("personal", ()), min_train_nodes=1, seed=3,
    )  # fmt: skip
    usual = LocalTraining(learning_rate=RATE, momentum=0.0, epochs=2, batch_size=64)
    app = client_app(model_fn, data, training=training or usual, **client)
    took_part, together = [], [0]

    def note(server_round, arrays):
        if server_round:
            report = strategy.last_report
            took_part.append((list(report.accepted), sorted(bad.client for bad in report.dropped)))

    with SimulationGrid(app, CLIENTS, engine="stacked" if road == "stacked" else "serial") as grid:
        real = grid.workers.train

        def train(*arguments):
            answer = real(*arguments)
            together[0] += answer.together
            return answer

        grid.workers.train = train
        done = strategy.start(grid, to_arrays(model_fn().state_dict()), num_rounds=rounds, evaluate_fn=note)
        kept = {
            node: {key: from_arrays(record) for key, record in state.array_records.items()}
            for node, state in grid.client_states().items()
        }
    return from_arrays(done.arrays), kept, took_part, together[0]


def alike(model_fn, method, **settings):
    """By all three roads the same, what clients keep included; and what that is."""
    told, alone, stacked = (run(road, model_fn, method, **settings) for road in ("messages", "serial", "stacked"))
    assert told[2] == alone[2] == stacked[2]
    assert stacked[3] > 0, "nobody trained stacked"
    for (one, mine, *_), exact in ((alone, True), (stacked, False)):
        assert mine.keys() == told[1].keys()
        pairs = [("model", one, told[0])]
        for node, records in told[1].items():
            assert mine[node].keys() == records.keys()
            pairs += [(f"{node} {key}", mine[node][key], record) for key, record in records.items()]
        for what, found, expected in pairs:
            assert found.keys() == expected.keys(), what
            for name, tensor in expected.items():
                if exact:
                    assert torch.equal(found[name], tensor), (what, name)
                else:
                    torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=f"{what} {name}")
    return told


def trained_by_hand(model, rule, client, begin, c, variates):
    """One client's tensors after two steps on all of its examples, by the paper's gradients."""
    model.load_state_dict(begin)
    model.train()
    if not model.body.weight.requires_grad:
        model.body.eval()
    x, y = data(client, CLIENTS).train.tensors
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(named.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
                added = c[name] if rule == "scaffold" and name in c else 0.0
                pull = ALPHA * (parameter - begin[name]) if rule == "feddyn" else 0.0
                parameter.sub_(RATE * (gradient + added + pull - variates.get(name, 0.0)))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def by_hand(rule, rounds, *, personal, frozen, buffers_of):
    """The shared parameters after some rounds, each client's variates and each client's own tensors.

    `rounds` holds who was merged, and whose update was lost, of each.
    """
    model = net(frozen=frozen)
    sent = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = {i: {n: t.clone() for n, t in sent.items() if n.startswith(personal)} for i in range(CLIENTS)}
    shared = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(personal)]
    c = {name: torch.zeros_like(sent[name]) for name in shared}
    variates = {i: dict(c) for i in range(CLIENTS)}
    for merged, lost in rounds:
        ends, after = {}, {}
        for i in sorted([*merged, *lost]):
            ends[i] = trained_by_hand(model, rule, i, {**sent, **own[i]}, c, variates[i])
            own[i] = {name: ends[i][name] for name in own[i]}
            moved = {name: sent[name] - ends[i][name] for name in shared}
            gained = {n: m / (2 * RATE) - c[n] if rule == "scaffold" else ALPHA * m for n, m in moved.items()}
            after[i] = {name: variates[i][name] + gained[name] for name in shared}
        following, sizes = dict(sent), [len(data(i, CLIENTS)) for i in merged]
        for name in shared:
            step = sum(ends[i][name] - sent[name] for i in merged)
            following[name] = sent[name] + step / len(merged)
            if rule == "scaffold":
                c[name] = c[name] + sum(after[i][name] - variates[i][name] for i in merged) / CLIENTS
            else:
                c[name] = c[name] - ALPHA / CLIENTS * step
                following[name] = following[name] - c[name] / ALPHA
        for name in buffers_of:
            whole = [ends[i][name] for i in merged]
            mean = sum(n * tensor for n, tensor in zip(sizes, whole, strict=True)) / sum(sizes)
            following[name] = mean if whole[0].is_floating_point() else torch.stack(whole).amax(0)
        variates |= {i: after[i] for i in merged}
        sent = following
    return {n: sent[n] for n in shared}, variates, own, shared


@pytest.mark.parametrize("lost", [False, True], ids=["all arrive", "some lost"])
@pytest.mark.parametrize("parts", ["head and frozen body", "own norm", "all shared"])
@pytest.mark.parametrize("rule", ["scaffold", "feddyn"])
def test_a_rule_moves_what_travels_as_its_paper_says(rule, parts, lost):
    frozen, personal = parts.startswith("head"), {"h": "head.", "o": "norm."}.get(parts[0], "none.")
    model_fn = frozen_net if frozen else net
    settings = {"personal": (f"{personal}*",)} if personal != "none." else {}
    if lost:
        settings["mishaps"] = Mishaps(Faults(nan=0.3), 4)
    method = f"feddyn(alpha={ALPHA})" if rule == "feddyn" else rule
    state, kept, rounds, _ = alike(model_fn, method, rounds=4, fraction=0.6, **settings)
    assert any(bad for _, bad in rounds) == lost
    assert {i for merged, _ in rounds for i in merged} != set(rounds[0][0])
    buffers = [n for n, _ in model_fn().named_buffers() if not n.startswith(personal)]
    want, variates, own, shared = by_hand(rule, rounds, personal=personal, frozen=frozen, buffers_of=buffers)
    for name, tensor in want.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    name = {"scaffold": "control_variates", "feddyn": "dynamic"}[rule]
    lost_last = {i: i in bad for good, bad in rounds for i in (*good, *bad)}
    for node, records in kept.items():
        i = node - FIRST_NODE
        assert set(records[f"fedmerge.rule.{name}"]) == set(shared)
        if lost_last[i]:
            continue  # it takes back what it kept when it is next asked
        for shared_name, tensor in records[f"fedmerge.rule.{name}"].items():
            torch.testing.assert_close(tensor, variates[i][shared_name], rtol=1e-4, atol=1e-5, msg=shared_name)
        for mine, tensor in records.get("fedmerge.personal", {}).items():
            torch.testing.assert_close(tensor, own[i][mine], rtol=1e-4, atol=1e-5, msg=mine)


MOMENTUM = LocalTraining(learning_rate=RATE, momentum=0.9, epochs=2, batch_size=4)
STACKED = {
    "a head": (plain_net, "fedavg", {"personal": ("head.*",)}),
    "a head of linear layers": (layered_net, "fedavg", {"personal": ("2.*",)}),
    "norms": (net, "fedavg", {"personal": ("norm.*",)}),
    "norms and a head": (net, "fednova", {"personal": ("norm.*", "head.*")}),
    "a head over a frozen body": (frozen_net, "fedavg", {"personal": ("head.*",)}),
    "a head under a pull": (plain_net, "fedprox(proximal_mu=0.5)", {"personal": ("head.*",)}),
    "a head of linear layers under a pull": (layered_net, "feddyn", {"personal": ("2.*",)}),
    "a head with control variates": (net, "scaffold", {"personal": ("head.*",), "training": MOMENTUM}),
    "a head that is trained first": (
        net, "fedavg",
        {"personal": ("head.*",), "training": LocalTraining(learning_rate=RATE, personal_epochs=2, batch_size=4)},
    ),
    "a head of linear layers that is trained first": (
        layered_net, "fedavg",
        {"personal": ("2.*",), "training": LocalTraining(learning_rate=RATE, personal_epochs=1, proximal_mu=0.3)},
    ),
    "a head beside statistics of norms that stay": (net, "fedavg", {"personal": ("head.*",), "batch_norm": "local"}),
    "statistics of norms that stay": (net, "fedavg", {"batch_norm": "local"}),
    "a head under adam": (
        plain_net, "fedavg", {"personal": ("head.*",), "training": LocalTraining(optimizer="adam", batch_size=4)}
    ),
    "a head among hostile clients": (
        plain_net, "fedavg", {"personal": ("head.*",), "tamper": Hostile(SignFlip(2.0), frozenset({1, 3}), 3, 0)}
    ),
    "a head and faults": (
        plain_net, "fedavg", {"personal": ("head.*",), "mishaps": Mishaps(Faults(crash=0.2, garbage=0.2), 1)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STACKED)
def test_personal_parts_train_stacked_from_each_clients_own(case):
    model_fn, method, settings = STACKED[case]
    if "personal" in settings and "training" not in settings:
        settings = {"training": LocalTraining(learning_rate=RATE, momentum=0.5, epochs=1, batch_size=4), **settings}
    _, kept, _, _ = alike(model_fn, method, fraction=0.8, **settings)
    key = "fedmerge.personal" if "personal" in settings else None
    owns = [records[key] for records in kept.values()] if key else []
    if owns:
        name = next(name for name, tensor in owns[0].items() if tensor.is_floating_point())
        assert not torch.equal(owns[0][name], owns[1][name])
