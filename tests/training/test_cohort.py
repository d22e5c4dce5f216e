"""Many clients in one call end where each would have ended alone."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmerge.errors import CannotStack, InvalidOption
from fedmerge.models import build_model
from fedmerge.training import LocalTraining, Participant, cohort, stack_size, train, train_cohort
from fedmerge.training.linear_layers import linear_layers

RAGGED = (13, 7, 20, 1, 12)
OPTIMISERS = {
    "sgd": {"momentum": 0.0},
    "momentum": {"momentum": 0.9},
    "decay": {"momentum": 0.0, "weight_decay": 0.05},
    "momentum decay": {"momentum": 0.5, "weight_decay": 0.05},
    "proximal": {"momentum": 0.0, "proximal_mu": 0.5, "weight_decay": 0.02},
    "momentum proximal": {"momentum": 0.9, "proximal_mu": 0.5},
    "adam": {"optimizer": "adam", "learning_rate": 0.003, "weight_decay": 0.01, "proximal_mu": 0.1},
    "clip": {"momentum": 0.9, "clip_norm": 0.3, "weight_decay": 0.02, "proximal_mu": 0.1},
}


def clients(shape=(1, 8, 8), sizes=RAGGED, classes=3, dtype=torch.float32):
    rng = torch.Generator().manual_seed(5)
    return [
        Participant(
            10 + i, torch.randn(n, *shape, generator=rng).to(dtype), torch.randint(classes, (n,), generator=rng)
        )
        for i, n in enumerate(sizes)
    ]


def small(name="mlp", shape=(1, 8, 8), classes=3, **options):
    return build_model(name, shape, classes, seed=0, **options)


def alone(model, people, settings, seed=3, round=2):
    """The serial path, on the very module: a copy of a patched one would run the old one's forward."""
    start, states, reports = copy.deepcopy(model.state_dict()), [], []
    for one in people:
        reports.append(train(model, one.x, one.y, settings, seed=seed, client=one.client, round=round))
        states.append(copy.deepcopy(model.state_dict()))
        model.load_state_dict(start)
    return states, reports


def check(model, people, settings, tolerance=1e-4, **options):
    """Stacked against serial: every client and tensor to a relative tolerance, and nothing done to the model given."""
    before, mode = copy.deepcopy(model.state_dict()), [module.training for module in model.eval().modules()]
    found = train_cohort(model, people, settings, seed=3, round=2, **options)
    assert [module.training for module in model.modules()] == mode
    assert list(found.states) == list(before)
    for name, start in before.items():
        assert torch.equal(model.state_dict()[name], start), f"the model given was changed: {name}"
        assert found.states[name].shape == (len(people), *start.shape)
        assert found.states[name].dtype == start.dtype
    states, reports = alone(model, people, settings)
    for index, (state, report) in enumerate(zip(states, reports, strict=True)):
        for name, want in state.items():
            error = (found.states[name][index] - want).double().norm()
            assert error <= tolerance * want.double().norm() + 1e-7, (index, name, float(error))
        got = found.reports[index]
        assert got.loss == pytest.approx(report.loss, rel=tolerance)
        assert (got.steps, got.momentum, got.proximal_mu) == (report.steps, report.momentum, report.proximal_mu)
    return found


@pytest.fixture(params=["by hand", "vmap"])
def engine(request, monkeypatch):
    """Both engines, for models that the fast one knows."""
    if request.param == "vmap":
        monkeypatch.setattr(cohort, "linear_layers", lambda *_: None)
    return request.param


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_fifty_steps_of_an_mlp(engine, kind):
    settings = LocalTraining(**{"learning_rate": 0.05, **OPTIMISERS[kind]}, steps=50, batch_size=5)
    check(small(hidden=[9, 6]), clients(sizes=(13, 7, 20)), settings)


@pytest.mark.parametrize("length", [{"epochs": 1}, {"epochs": 3}, {"steps": 1}, {"steps": 4}, {}])
@pytest.mark.parametrize("batch_size", [4, 12, 99])
def test_clients_of_unequal_sizes(engine, length, batch_size):
    """Momentum would carry on a client that has finished, decay would shrink it."""
    settings = LocalTraining(learning_rate=0.1, momentum=0.9, weight_decay=0.1, batch_size=batch_size, **length)
    check(small(hidden=[9]), clients(), settings)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_any_division_into_stacks_gives_the_same(engine, at_once):
    check(small(hidden=[9]), clients(), LocalTraining(epochs=2, batch_size=4), at_once=at_once)


def test_linear_models_of_every_sort_are_trained_by_hand():
    nets = [
        small("logistic"),
        small(bias=False),
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 9),
            nn.Tanh(),
            nn.Linear(9, 5, bias=False),
            nn.Sigmoid(),
            nn.Linear(5, 3),
            nn.Tanh(),
        ),
        nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 4), nn.ReLU()), nn.Identity(), nn.Linear(4, 3)),
    ]
    for net in nets:
        assert linear_layers(net, clients()[0].x, clients()[0].y)
        check(net, clients(), LocalTraining(epochs=2, batch_size=5))
    check(nn.Linear(6, 3), clients((6,)), LocalTraining(epochs=2, batch_size=5))


def test_what_only_looks_linear_is_not_trained_by_hand():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked, patched, tied = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, given, out: 2 * out)
    patched.forward = lambda x: 2 * F.linear(x, patched.weight, patched.bias)
    shared = nn.Sequential(tied, nn.ReLU(), tied)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    x, y = torch.randn(5, 4), torch.arange(5) % 4
    for net in (Doubled(4, 4), hooked, patched, shared, normed, nn.Sequential(nn.Linear(4, 4), nn.GELU())):
        assert linear_layers(net, x, y) is None
        check(net, [Participant(0, x, y), Participant(1, x[:3], y[:3])], LocalTraining(epochs=2, batch_size=2))
    relu = nn.Tanh()
    twice = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 4))
    assert [layer.activation for layer in linear_layers(twice, x, y)] == ["tanh", "tanh", None]


def test_doubles_stay_doubles(engine):
    people = clients(dtype=torch.float64)
    check(small(hidden=[9]).double(), people, LocalTraining(learning_rate=0.1, steps=50, batch_size=5), tolerance=1e-11)


@pytest.mark.parametrize("frozen", ["layers.0.weight", "layers.1.bias", "layers.0", "layers.2", "layers.1"])
def test_frozen_parameters_stay(engine, frozen):
    net = small(hidden=[9, 6])
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    check(net, clients(), LocalTraining(learning_rate=0.1, momentum=0.0, weight_decay=0.1, epochs=2, batch_size=5))


def test_ignored_labels_do_not_count(engine):
    people = clients()
    for one in people[:3]:
        one.y[1::3] = -100
    check(small(hidden=[9]), people, LocalTraining(epochs=2, batch_size=4))


def test_lenet():
    check(small("lenet", channels=(2, 3), hidden=(6,)), clients(), LocalTraining(steps=50, batch_size=5))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_resnet_of_unequal_clients(norm):
    """Sizes that leave short batches at different steps: a padded row would show in the statistics."""
    net = small("resnet8", (1, 5, 5), width=2, norm=norm).double()
    people = clients((1, 5, 5), (7, 12, 4, 13), dtype=torch.float64)
    check(net, people, LocalTraining(learning_rate=0.02, epochs=2, batch_size=4), tolerance=1e-9)


def test_fifty_steps_of_a_resnet_with_batch_norm():
    settings = LocalTraining(learning_rate=0.01, momentum=0.5, steps=50, batch_size=4)
    check(small("resnet8", width=4), clients(sizes=(7, 12)), settings)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_vgg_with_dropout_draws_the_masks_of_each_client(kind):
    net = small("vgg9", channels=(2, 2, 3, 3, 3, 3), hidden=(8, 8), dropout=0.4)
    settings = LocalTraining(**{"learning_rate": 0.05, **OPTIMISERS[kind]}, steps=50, batch_size=5)
    check(net, clients(sizes=(13, 7)), settings)


class Centred(nn.Module):
    """Rows that see each other, without a buffer to tell."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(64, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.output(x - x.mean(0))


class Counting(nn.Linear):
    """A buffer that sees the rows, which do not see each other."""

    def __init__(self):
        super().__init__(64, 3)
        self.register_buffer("seen", torch.zeros(64))

    def forward(self, x):
        self.seen.add_(x.flatten(1).sum(0).detach())
        return super().forward(x.flatten(1))


@pytest.mark.parametrize("make", [Centred, Counting])
def test_padded_rows_stay_out_of_whatever_sees_a_batch(make):
    check(make(), clients(), LocalTraining(learning_rate=0.05, epochs=3, batch_size=5))


def test_dropout_of_every_sort():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Dropout(0.3, inplace=True), nn.ReLU(), nn.Dropout(0.0), nn.Dropout2d(0.5), nn.Flatten(),
        nn.Linear(144, 3),
    )  # fmt: skip
    check(net, clients(), LocalTraining(epochs=2, batch_size=5))


def test_a_vision_transformer():
    net = small("vit", patch=4, dim=8, heads=2, depth=1)
    check(net, clients(), LocalTraining(learning_rate=0.05, steps=10, batch_size=5))


def test_tied_weights_and_unused_ones():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(64, 64, bias=False)
            self.two = nn.Linear(64, 64, bias=False)
            self.two.weight = self.one.weight
            self.unused = nn.Parameter(torch.ones(3))
            self.register_buffer("scale", torch.full((), 0.5), persistent=False)

        def forward(self, x):
            return self.scale * self.two(torch.tanh(self.one(x.flatten(1))))[:, :3]

    check(Odd(), clients(), LocalTraining(weight_decay=0.1, epochs=2, batch_size=5))


def test_labels_of_sequences():
    rng = torch.Generator().manual_seed(1)
    people = [
        Participant(i, torch.randint(9, (n, 5), generator=rng), torch.randint(4, (n, 5), generator=rng))
        for i, n in enumerate((6, 3, 8))
    ]
    people[0].y[:, 2] = -100
    net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    check(net, people, LocalTraining(epochs=3, batch_size=4))


def test_an_lstm_cannot_be_stacked():
    people = [
        Participant(i, torch.zeros(4, 5, dtype=torch.long), torch.zeros(4, 5, dtype=torch.long)) for i in range(2)
    ]
    with pytest.raises(CannotStack, match="LSTM"):
        train_cohort(small("char_lstm", (5,), 9, hidden=4), people, LocalTraining(), seed=0, round=0)


def test_random_draws_that_are_no_dropout_cannot_be_stacked():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1) + torch.randn_like(x.flatten(1)))

    net = Noisy(64, 3)
    with pytest.raises(CannotStack, match="random"):
        train_cohort(net, clients(), LocalTraining(), seed=0, round=0)


def test_memory_bounds_a_stack(monkeypatch):
    net, one = small("lenet", channels=(2, 3), hidden=(6,)), clients()[2]
    settings = LocalTraining(batch_size=20)
    each = stack_size.bytes_per_client(net, one.x, settings)
    # Weights, gradients and momentum; the output of the first convolution and of its ReLU, and their gradients.
    assert each > 3 * sum(p.numel() * 4 for p in net.parameters()) + 2 * 2 * 20 * 2 * 64 * 4
    for free, fit in ((6 * each, 3), (each, 1), (0, 1)):
        monkeypatch.setattr(stack_size, "free_memory", lambda device, free=free: free)
        assert stack_size.clients_at_once(net, one, settings, by_hand=False) == fit


def test_inputs_of_unequal_shapes_cannot_be_stacked():
    people = [*clients((6,), (3,)), *clients((5,), (3,))]
    with pytest.raises(CannotStack, match="shapes"):
        train_cohort(nn.Linear(6, 3), people, LocalTraining(), seed=0, round=0)


def test_same_seeds_same_bits_and_the_global_stream_untouched(engine):
    net = small("vgg9", channels=(3,) * 6, hidden=(8, 8), dropout=0.4)
    for model in (net, small(hidden=[9])):
        before = torch.get_rng_state()
        one, two, other = (
            train_cohort(model, clients(), LocalTraining(batch_size=5), seed=s, round=2).states for s in (1, 1, 2)
        )
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("CUDA out of memory"), MemoryError()])
def test_stacks_are_halved_where_memory_runs_out(monkeypatch, error):
    tried, real = [], cohort.train_linear

    def tight(layers, stack, *rest):
        clients = len(stack.weights["layers.0.weight"])
        tried.append(clients)
        done = real(layers, stack, *rest)
        if clients > 2:
            raise error  # half done: what was trained in place must not be the start of the second try
        return done

    monkeypatch.setattr(cohort, "train_linear", tight)
    check(small(hidden=[9]), clients(sizes=(5, 6, 7, 8, 9, 4, 3, 2)), LocalTraining(batch_size=4), at_once=8)
    assert tried == [8, 4, 2, 2, 2, 2]


def test_other_errors_and_a_single_client_that_does_not_fit_are_raised(monkeypatch):
    def fail(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(cohort, "train_linear", fail)
    for message in ("something else", "out of memory"):
        with pytest.raises(RuntimeError, match=message):
            train_cohort(small(), clients(), LocalTraining(), seed=0, round=0, at_once=4)


def test_no_participants_and_no_examples():
    with pytest.raises(InvalidOption, match="no participants"):
        train_cohort(small(), [], LocalTraining(), seed=0, round=0)
    with pytest.raises(InvalidOption, match="client 12 has no examples"):
        train_cohort(small(), clients(sizes=(3, 4, 0)), LocalTraining(), seed=0, round=0)
    with pytest.raises(InvalidOption, match="at_once"):
        train_cohort(small(), clients(), LocalTraining(), seed=0, round=0, at_once=0)


def test_one_clients_state_loads_into_the_model():
    net, found = small(), train_cohort(small(), clients(), LocalTraining(), seed=3, round=2)
    net.load_state_dict(found.state(1))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), found.state(1).values(), strict=True))
    assert all(not torch.equal(one, two) for one, two in pairwise(found.states["layers.0.weight"]))
