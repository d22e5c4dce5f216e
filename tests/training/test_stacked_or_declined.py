"""Whatever a model does in its forward pass: its clients train stacked as they do alone, or a reason says why not."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from fedmerge.errors import CannotStack
from fedmerge.training import LocalTraining, Participant, choose_engine, train_cohort, train_one_by_one

NAMES = {"seed": 4, "round": 2}
SETTINGS = LocalTraining(learning_rate=0.1, momentum=0.5, epochs=2, batch_size=4)


def rows(*shape):
    rng = torch.Generator().manual_seed(2)
    sizes = enumerate((9, 6, 4))
    return [Participant(i, torch.randn(n, *shape, generator=rng).double(), torch.arange(n) % 3) for i, n in sizes]


def tokens():
    """The first client has no padding, the others have."""
    rng = torch.Generator().manual_seed(2)
    people = [
        Participant(i, torch.randint(1, 7, (n, 4), generator=rng), torch.arange(n) % 3) for i, n in enumerate((9, 6, 4))
    ]
    for one in people[1:]:
        one.x[:, 2:] = 0
    return people


class Head(nn.Module):
    """A part between two layers; `around(self, h)` where given is the forward pass between them."""

    def __init__(self, part=None, around=None, width=6):
        super().__init__()
        self.first, self.part, self.last = nn.Linear(5, 6), part or nn.Identity(), nn.Linear(width, 3)
        self.around = around

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = self.part(h) if self.around is None else self.around(self, h)
        return self.last(h.flatten(1))


class Sound(torch.autograd.Function):
    """A rounding with the gradient of the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h):
        return h.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Straight(Sound):
    """The same, for which somebody wrote a rule of vmap that is wrong."""

    generate_vmap_rule = False

    @staticmethod
    def vmap(info, dims, h):
        return h.round() * 2, dims[0]


class Bags(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.bag, self.last = nn.EmbeddingBag(7, 6, mode="sum", **options), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.bag(x))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.look, self.layer, self.last = nn.Embedding(7, 4), kind(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.layer(self.look(x))[0][:, -1])


class Moving(nn.Module):
    """A mean that moves, by a new tensor in place of the old."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, h):
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return h - self.mean


def embedding(**options):
    return nn.Sequential(nn.Embedding(7, 6, **options), nn.Flatten(), nn.Linear(24, 3))


def unfrozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def tied():
    model = Head(nn.Linear(6, 6))
    model.again = model.part
    model.around = lambda self, h: self.part(torch.tanh(self.again(h)))
    return model


def hooked(register):
    model = Head()
    register(model)
    return model


def counting(self, h):
    self.calls = getattr(self, "calls", 0) + 1
    return h * (1 + self.calls / 10)


def remembering(self, h):
    self.notes = getattr(self, "notes", [])
    self.notes.append(h.detach().mean())
    return h


def clipped(self, h):
    with torch.no_grad():
        self.last.weight.clamp_(-0.2, 0.2)
    return h


def replaced(self, h):
    self.last.weight.data = self.last.weight.data.clamp(-0.2, 0.2)
    return h


def drawn_by_python(self, h):
    return h if random.random() < 0.5 else 2 * h


def drawn_by_numpy(self, h):
    return h * float(np.random.rand())  # noqa: NPY002


def reversed_gradient(self, h):
    if h.requires_grad:
        h.register_hook(lambda gradient: -gradient)
    return h


def inner_gradient(self, h):
    h = h if h.requires_grad else h.requires_grad_()
    return h + torch.autograd.grad((h**3).sum(), h, create_graph=True)[0]


def branching(self, h):
    return h if h.sum() > 0 else -h


# Models that train stacked, and those that must not, with a word of why.
STACKED = {
    "padding": lambda: (embedding(padding_idx=0), tokens()),
    "padding from the end": lambda: (embedding(padding_idx=-7), tokens()),
    "lookup with dropout": lambda: (nn.Sequential(nn.Embedding(7, 6, 0), nn.Dropout(0.4), *embedding()[1:]), tokens()),
    "frozen": lambda: (unfrozen(Head(nn.Linear(6, 6)), "first.weight", "part.bias"), rows(5)),
    "used twice": lambda: (tied(), rows(5)),
    "in place": lambda: (Head(around=lambda self, h: h.clone().mul_(2).add_(h.detach())), rows(5)),
    "written to": lambda: (Head(around=lambda self, h: torch.cat([h[:, :3] * 2, h[:, 3:]], 1)), rows(5)),
    "detached": lambda: (Head(around=lambda self, h: h * h.detach()), rows(5)),
    "without gradients": lambda: (Head(around=lambda self, h: h * torch.no_grad()(torch.sigmoid)(h)), rows(5)),
    "dropout on features": lambda: (Head(nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Dropout1d(0.4))), rows(5)),
    "group norm": lambda: (Head(nn.GroupNorm(2, 6)), rows(5)),
    "weight norm": lambda: (Head(parametrizations.weight_norm(nn.Linear(6, 6))), rows(5)),
    "a gradient of one's own with a generated rule": lambda: (Head(around=lambda self, h: Sound.apply(3 * h)), rows(5)),
    "attention": lambda: (
        Head(nn.Sequential(nn.Unflatten(1, (3, 2)), nn.TransformerEncoderLayer(2, 1, 4, 0.0, batch_first=True))),
        rows(5),
    ),
}  # fmt: skip
DECLINED = {
    "counts of rows": (lambda: (embedding(scale_grad_by_freq=True), tokens()), "scale_grad_by_freq"),
    "rows that are rescaled": (lambda: (embedding(max_norm=0.5), tokens()), "embedding_renorm"),
    "sparse": (lambda: (embedding(sparse=True), tokens()), "sparse"),
    "bags": (lambda: (Bags(padding_idx=0), tokens()), "embedding_bag"),
    "lstm": (lambda: (Recurrent(nn.LSTM), tokens()), "LSTM 'layer'"),
    "old weight norm": (lambda: (Head(nn.utils.weight_norm(nn.Linear(6, 6))), rows(5)), "'weight'"),
    "old spectral norm": (lambda: (Head(nn.utils.spectral_norm(nn.Linear(6, 6))), rows(5)), "'weight'"),
    "pruned": (lambda: (Head(prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5)), rows(5)), "'weight'"),
    "orthogonal": (lambda: (Head(parametrizations.orthogonal(nn.Linear(6, 6))), rows(5)), "linalg_matrix_exp"),
    "a rule of one's own": (lambda: (Head(around=lambda self, h: Straight.apply(3 * h)), rows(5)), "Straight"),
    "computed again": (
        lambda: (Head(around=lambda self, h: checkpoint(torch.sigmoid, h, use_reentrant=False)), rows(5)), "again",
    ),
    "computed again, the old way": (
        lambda: (Head(around=lambda self, h: checkpoint(torch.sigmoid, h, use_reentrant=True)), rows(5)), "Checkpoint",
    ),
    "a counter": (lambda: (Head(around=counting), rows(5)), "'calls'"),
    "notes": (lambda: (Head(around=remembering), rows(5)), "'notes'"),
    "a buffer that is replaced": (lambda: (Head(Moving()), rows(5)), "buffers"),
    "weights that are clipped": (lambda: (Head(around=clipped), rows(5)), "parameter 'last.weight'"),
    "weights that are replaced": (lambda: (Head(around=replaced), rows(5)), "replaced|parameter"),
    "a branch": (lambda: (Head(around=branching), rows(5)), "_local"),
    "a gradient that is turned round": (lambda: (Head(around=reversed_gradient), rows(5)), "hook on a tensor"),
    "a gradient within": (lambda: (Head(around=inner_gradient), rows(5)), "gradient"),
    "noise": (lambda: (Head(around=lambda self, h: h + torch.randn_like(h)), rows(5)), "random draw 'randn_like'"),
    "alpha dropout": (lambda: (Head(nn.AlphaDropout(0.4)), rows(5)), "random operation"),
    "random slopes": (lambda: (Head(nn.RReLU()), rows(5)), "rrelu"),
    "attention with dropout": (
        lambda: (
            Head(around=lambda self, h: F.scaled_dot_product_attention(*[h.view(-1, 3, 2)] * 3, dropout_p=0.5)), rows(5)
        ), "random operation",
    ),
    "a hook on a parameter": (
        lambda: (hooked(lambda m: m.last.weight.register_hook(lambda g: 2 * g)), rows(5)), "parameter 'last.weight'",
    ),
    "a hook on the layers of a perceptron": (
        lambda: (masked(), rows(5)), "parameter '0.weight'",
    ),
    "a hook on a backward pass": (
        lambda: (hooked(lambda m: m.last.register_full_backward_hook(lambda *_: None)), rows(5)), "'last'",
    ),
    "batch norm without momentum": (lambda: (Head(nn.BatchNorm1d(6, momentum=None)), rows_for_norms()), "_local"),
}  # fmt: skip
# Draws that one seed does not repeat: there is nothing to compare.
UNREPEATABLE = {
    "python's numbers": (lambda: (Head(around=drawn_by_python), rows(5)), "random numbers"),
    "numpy's numbers": (lambda: (Head(around=drawn_by_numpy), rows(5)), "random numbers"),
}


def rows_for_norms():
    return [Participant(one.client, one.x[:8], one.y[:8]) for one in rows(5)]


def masked():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    model[0].weight.register_hook(lambda gradient: gradient * 0)
    return model


def made(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, people = make()
        return model.double(), people


def alone(make):
    model, people = made(make)
    return train_one_by_one(model, people, SETTINGS, **NAMES).states


@pytest.mark.parametrize("kind", STACKED)
def test_stacked_training_is_that_of_each_alone(kind):
    model, people = made(STACKED[kind])
    found = train_cohort(model, people, SETTINGS, **NAMES).states
    for name, want in alone(STACKED[kind]).items():
        torch.testing.assert_close(found[name], want, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", [*DECLINED, *UNREPEATABLE])
def test_what_cannot_be_stacked_is_declined_in_words_and_left_as_it_is(kind):
    make, word = {**DECLINED, **UNREPEATABLE}[kind]
    model, people = made(make)
    before, attributes = copy.deepcopy(dict(model.state_dict())), [set(vars(module)) for module in model.modules()]
    with pytest.raises(CannotStack, match=word) as error:
        train_cohort(model, people, SETTINGS, **NAMES)
    assert error.value.reason
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", DECLINED)
def test_the_choice_between_engines_changes_nothing(kind):
    """Not even in models that note in attributes how often they were called."""
    make = DECLINED[kind][0]
    model, people = made(make)
    assert choose_engine(model, people, SETTINGS, **NAMES).name == "serial"
    found = train_one_by_one(model, people, SETTINGS, **NAMES).states
    assert all(torch.equal(found[name], want) for name, want in alone(make).items())
