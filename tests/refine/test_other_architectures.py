"""fedkfac on recurrent networks and transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import fedmerge
from fedmerge.models import build_model
from fedmerge.training import LocalTraining, train


def lstm(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model("char_lstm", (12,), 8, seed=seed, hidden=12, embedding=4)


def vit(seed):
    return build_model("vit", (1, 8, 8), 4, seed=seed, dim=16, depth=1, heads=2, patch=4)


def counting(step, n=60):
    """Sequences that count upwards in steps."""
    start = torch.randint(8, (n, 1), generator=torch.Generator().manual_seed(step))
    whole = (start + step * torch.arange(13)) % 8
    return whole[:, :-1], whole[:, 1:]


def corners(client, n=60):
    """Images with one bright corner; every client knows two of four."""
    generator = torch.Generator().manual_seed(client)
    y = torch.randint(2, (n,), generator=generator) + 2 * (client % 2)
    x = 0.5 * torch.randn(n, 1, 8, 8, generator=generator)
    for i, label in enumerate(y.tolist()):
        x[i, 0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 1.0
    return x, y


@pytest.mark.parametrize(("made", "data", "rate"), [(lstm, counting, 0.5), (vit, corners, 0.05)])
def test_recurrent_networks_and_transformers_gain_by_it(made, data, rate):

    base, models, loaders = made(0), [], []
    for client in (1, 2):
        model, (x, y) = copy.deepcopy(base), data(client)
        train(model, x, y, LocalTraining(epochs=5, learning_rate=rate), seed=0, client=client, round=1)
        models.append(model)
        loaders.append([(x, y)])
    x, y = (torch.cat([batch[0][i] for batch in loaders]) for i in (0, 1))

    def loss(method):
        merged = fedmerge.merge(models, method, base=base, clients=loaders).eval()
        return float(F.cross_entropy(merged(x).flatten(0, -2), y.flatten()).detach())

    head = loss("fedkfac(steps=0)")
    assert loss("fedkfac(steps=1)") < 0.95 * head
    assert head < 0.95 * loss("fedavg")
