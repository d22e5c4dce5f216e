"""PWE-MoE: a model for every preference, against NumPy and its laws."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

import fedmerge
from fedmerge.simulation import SimulationGrid
from fedmerge.strategies import MergeStrategy
from tests.federation import CLIENTS, initial, tiny_app, tiny_model


def opposed():
    """Two clients of opposite opinion, a base between them, and examples of which each has half."""
    base = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        base[0].weight.zero_()
    models = [copy.deepcopy(base), copy.deepcopy(base)]
    for model, sign in zip(models, (2.0, -2.0), strict=True):
        model[0].weight.data = torch.tensor([[sign, 0.0], [-sign, 0.0]])
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    first = torch.arange(40) < 20
    return base, models, x, torch.where(first, x[:, 0] < 0, x[:, 0] > 0).long(), first


def test_each_preference_has_a_model_that_serves_it():
    base, models, x, y, first = opposed()
    merged = fedmerge.merge(models, "pwe_moe", base=base, data=[(x, y)], steps=300, learning_rate=0.02)

    def accuracy(preference, part):
        return float((merged.of_preference(preference)(x[part]).argmax(1) == y[part]).float().mean())

    assert accuracy([1.0, 0.0], first) > 0.95
    assert accuracy([0.0, 1.0], ~first) > 0.95
    assert accuracy([1.0, 0.0], ~first) < 0.05
    torch.testing.assert_close(merged.of_client(1)(x), merged.of_preference([0.0, 1.0])(x))
    torch.testing.assert_close(merged(x), merged.of_preference([0.5, 0.5])(x))


def test_a_model_is_what_numpy_makes_of_the_gates():
    base, models, x, y, _ = opposed()
    merged = fedmerge.merge(models, "pwe_moe", base=base, data=[(x, y)], steps=3, hidden=3)
    (w0, b0), (w1, b1) = [(w.numpy(force=True), b.numpy(force=True)) for w, b in merged.routing.gates["0"].layers]
    for r in ([0.3, 0.7], [1.0, 0.0]):
        g = w1 @ np.maximum(w0 @ np.array(r) + b0, 0) + b1
        want = sum(g[i] * models[i][0].weight.numpy(force=True) for i in range(2))
        np.testing.assert_allclose(merged.of_preference(r)[0].weight.numpy(force=True), want, rtol=1e-5)


def test_a_step_is_against_the_gradient_of_the_weighted_losses():
    """The first step of Adam is as long as its rate, so that the bias tells the gradient's sign."""
    base, models, x, y, first = opposed()
    start = fedmerge.merge(models, "pwe_moe", base=base, data=[(x, y)], steps=0, hidden=2, seed=4)
    moved = fedmerge.merge(models, "pwe_moe", base=base, data=[(x, y)], steps=1, hidden=2, seed=4)
    draw = fedmerge.MergeContext(seed=4).torch_generator("pwe_moe preferences")
    e = -np.log(torch.rand(2, generator=draw).numpy().astype(float))
    r, data, slopes = e / e.sum(), x.numpy().astype(float), np.zeros(2)
    signs, target = np.array([2.0, -2.0]), y.numpy()
    for i, mine in enumerate((first.numpy(), ~first.numpy())):
        z = np.stack([data[mine, 0], -data[mine, 0]], 1) * (signs * 0.5).sum()  # at equal factors of 1/2
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        p[np.arange(len(p)), target[mine]] -= 1
        for j in range(2):
            change = np.stack([data[mine, 0], -data[mine, 0]], 1) * signs[j]
            slopes[j] += r[i] * (p * change).sum(1).mean()
    change = moved.routing.gates["0"].layers[1][1] - start.routing.gates["0"].layers[1][1]
    np.testing.assert_allclose(change.numpy(force=True), -0.01 * np.sign(slopes), rtol=1e-3)


def test_before_any_step_every_preference_is_task_arithmetic():
    base, models, x, y, _ = opposed()
    merged = fedmerge.merge(models, "pwe_moe", base=base, data=[(x, y)], weights=[1, 3], steps=0)
    want = fedmerge.merge(models, "fedavg", weights=[1, 3])
    for preference in ([1.0, 0.0], [0.2, 0.8]):
        torch.testing.assert_close(merged.of_preference(preference)(x), want(x))


def test_clients_judge_models_of_their_own():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(5))
    ours = MergeStrategy(
        "pwe_moe(steps=5,learning_rate=0.5)", seed=1, model_fn=tiny_model, data=[(x, torch.arange(30) % 3)]
    )
    judged = []
    with SimulationGrid(tiny_app(), CLIENTS) as grid:
        send = grid.send_and_receive

        def watched(messages, **more):
            sent = list(messages)
            judged.extend(m.content["arrays"] for m in sent if m.metadata.message_type == "evaluate")
            return send(sent, **more)

        grid.send_and_receive = watched
        ours.reads_messages = True
        ours.start(grid=grid, initial_arrays=initial(), num_rounds=1)
    weights = {bytes(arrays["0.weight"].data) for arrays in judged}
    assert len(judged) == len(weights) == CLIENTS
    routed = 4 * (4 * 6 + 6 + 6 * 3 + 3)
    assert ours.last_report.bytes_personal == CLIENTS * routed
