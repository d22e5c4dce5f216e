"""Orthogonal symmetries: what is found on tiny transformers, that it keeps the function, and why others have none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmerge.permutations import trace
from fedmerge.permutations.folding import Fold, folded, norms_of
from fedmerge.permutations.rotations import nearest_rotation, random_rotation, rotations

WIDTH, VOCABULARY = 8, 13


class HandNorm(nn.Module):
    """RMS norm as LLaMA writes it."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Decoder(nn.Module):
    """One block with causal attention; `norm` makes its norms, which stand before the layers unless `post`."""

    def __init__(self, norm=nn.LayerNorm, *, post=False, tied=False, biases=True, keys=2):
        super().__init__()
        self.post, self.keys = post, keys
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm1, self.norm2, self.last = (norm() if norm is HandNorm else norm(WIDTH) for _ in range(3))
        self.q, self.o = (nn.Linear(WIDTH, WIDTH, bias=biases) for _ in range(2))
        self.k, self.v = (nn.Linear(WIDTH, keys * WIDTH // 2, bias=biases) for _ in range(2))
        self.up, self.down = nn.Linear(WIDTH, 12, bias=biases), nn.Linear(12, WIDTH, bias=biases)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def attention(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, WIDTH // 2)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.keys < 2)
        return self.o(y.transpose(1, 2).flatten(2))

    def forward(self, tokens):
        x = self.embed(tokens)
        if self.post:
            x = self.norm1(x + self.attention(x))
            x = self.norm2(x + self.down(F.gelu(self.up(x))))
        else:
            x = x + self.attention(self.norm1(x))
            x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.last(x))


TOKENS = torch.arange(10).reshape(2, 5)


def varied(model, seed=0):
    """Scales, shifts and biases that show what a mistake does."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def found_in(model, **options):
    return rotations(trace(model, TOKENS), model, TOKENS, **options)


def turned_at_random(model, found, seed=0):
    """The outputs of a model whose neurons are all re-ordered and turned, in float64."""
    rng, spec = torch.Generator().manual_seed(seed), found.spec
    state = found.prepared({name: tensor.double() for name, tensor in model.state_dict().items()})
    state = spec.apply(state, spec.random(rng))
    matrices = {i: random_rotation(spec.groups[i].size, kind, rng) for i, kind in found.kinds.items()}
    return torch.func.functional_call(model.double(), found.turned(state, matrices), (TOKENS,), tie_weights=False)


NORMS = {"layer": (nn.LayerNorm, "centred"), "rms": (nn.RMSNorm, "full"), "by hand": (HandNorm, "full")}


@pytest.mark.parametrize("norm", NORMS)
def test_streams_and_heads_turn_and_the_function_stays(norm):
    kind, wanted = NORMS[norm]
    torch.manual_seed(1)
    model = varied(Decoder(kind))
    found = found_in(model)
    sizes = {(found.spec.groups[i].name, found.spec.groups[i].size): how for i, how in found.kinds.items()}
    assert sizes == {("embed.weight", WIDTH): wanted, ("q.weight", 4): "full", ("v.weight", 4): "full"}
    assert len(found.kinds) == 5  # two heads, each with queries and keys, and values
    assert {fold.scale.partition(".")[0] for fold in found.folds} == {"norm1", "norm2", "last"}
    assert not found.refused
    with torch.no_grad():
        before = model.double()(TOKENS)
        torch.testing.assert_close(turned_at_random(model, found), before, rtol=0, atol=1e-10)


def test_keys_that_serve_several_heads_turn_with_them():
    torch.manual_seed(1)
    model = varied(Decoder(nn.RMSNorm, keys=1))
    found = found_in(model)
    with torch.no_grad():
        before = model.double()(TOKENS)
        torch.testing.assert_close(turned_at_random(model, found), before, rtol=0, atol=1e-10)
    assert "full" in {found.kinds.get(i) for i in found.streams}


def test_a_rotation_that_moves_the_mean_is_none_of_a_layer_norm():
    model = varied(Decoder())
    found = found_in(model)
    (stream,) = found.streams
    state = found.prepared({name: tensor.double() for name, tensor in model.state_dict().items()})
    free = random_rotation(WIDTH, "full", torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.double()(TOKENS)
        after = torch.func.functional_call(model, found.turned(state, {stream: free}), (TOKENS,))
    assert float((after - before).abs().max()) > 1e-2


REFUSED = {
    "goes into add": lambda: Decoder(post=True),
    "tied to other weights": lambda: Decoder(nn.RMSNorm, tied=True),
    "no bias to take its shift": lambda: Decoder(biases=False),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_streams_that_may_not_be_turned_say_why(reason):
    """Fresh norms, whose ones and zeros would let all of them pass."""
    found = found_in(REFUSED[reason]().eval())
    (stream,) = found.streams
    assert stream not in found.kinds
    assert reason in found.refused[stream]
    assert len(found.kinds) == 4  # the heads turn all the same


def test_frozen_layers_are_not_folded_into():
    found = found_in(varied(Decoder()), frozen={"head.weight"})
    assert "frozen" in found.refused[found.streams[0]]
    assert "last.weight" not in {fold.scale for fold in found.folds}


def test_folding_is_a_product_and_a_sum():
    rng = np.random.default_rng(0)
    scale, shift, w, b = rng.normal(size=3), rng.normal(size=3), rng.normal(size=(2, 3)), rng.normal(size=2)
    state = {name: torch.from_numpy(value) for name, value in (("n", scale), ("s", shift), ("w", w), ("b", b))}
    done = folded(state, [Fold("n", "s", ("w",), {"w": "b"})])
    np.testing.assert_allclose(done["w"], w * scale, rtol=1e-12)
    np.testing.assert_allclose(done["b"], b + w @ shift, rtol=1e-12)
    assert done["n"].tolist() == [1, 1, 1]
    assert done["s"].tolist() == [0, 0, 0]
    assert torch.equal(state["w"], torch.from_numpy(w)), "what came in is left"


def test_a_norm_of_two_places_is_not_folded():
    shared = nn.LayerNorm(4)
    model = nn.Sequential(shared, nn.Linear(4, 4), shared, nn.Linear(4, 2)).eval()
    assert {fold.reason for fold in norms_of(model, torch.zeros(2, 4))} == {"it serves in several places"}


@pytest.mark.parametrize("kind", ["full", "centred"])
def test_procrustes_finds_the_rotation_between_two_matrices(kind):
    rng = torch.Generator().manual_seed(0)
    a, q = torch.randn(5, 9, generator=rng).double(), random_rotation(5, kind, rng)
    torch.testing.assert_close(nearest_rotation(a @ (q.T @ a).T, kind), q)


def test_procrustes_is_the_best_of_many():
    rng = torch.Generator().manual_seed(1)
    covariance = torch.randn(4, 4, generator=rng).double()
    for kind in ("full", "centred"):
        best = float((covariance * nearest_rotation(covariance, kind)).sum())
        tried = [float((covariance * random_rotation(4, kind, rng)).sum()) for _ in range(200)]
        assert best >= max(tried)
