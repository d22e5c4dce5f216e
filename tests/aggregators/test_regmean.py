"""RegMean against least squares, and its laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmerge import BadUpdate, ClientUpdate, InvalidOption, MergeContext
from fedmerge.merging import build_pipeline
from tests.random_statistics import random_grams

WEIGHTS = (5.0, 1.0, 14.0)
PAPER = {"shrinkage": 1.0, "ridge": 0.0, "ridge_convolution": 0.0, "normalize": "none"}


def states(count=3):
    generator = torch.Generator().manual_seed(2)
    shapes = {"fc.weight": (3, 4), "fc.bias": (3,), "conv.weight": (2, 3, 2, 2), "scale": (5,)}
    return [
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()} for _ in range(count)
    ]


def merged(sent, grams, weights=WEIGHTS, **options):
    updates = [ClientUpdate(i, s, weights[i], {"gram": g}) for i, (s, g) in enumerate(zip(sent, grams, strict=True))]
    return build_pipeline("regmean", {"regmean": options}, on_bad_update="raise").merge(updates, MergeContext()).state


def average(sent, weights=WEIGHTS):
    return {n: sum(w * s[n] for w, s in zip(weights, sent, strict=True)) / sum(weights) for n in sent[0]}


def test_it_is_the_least_squares_fit_of_the_clients_outputs():
    rng = np.random.default_rng(0)
    sent = [{"w": s["fc.weight"]} for s in states()]
    inputs = [rng.normal(size=(n, 4)) for n in (50, 10, 140)]
    grams = [{"w": torch.from_numpy(x.T @ x / len(x))} for x in inputs]
    got = merged(sent, grams, [len(x) for x in inputs], **PAPER)["w"]
    outputs = np.vstack([x @ s["w"].numpy().T for x, s in zip(inputs, sent, strict=True)])
    wanted = np.linalg.lstsq(np.vstack(inputs), outputs, rcond=None)[0].T
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-9)


@pytest.mark.parametrize("options", [{}, PAPER, {"normalize": "all", "shrinkage": 0.5}])
def test_identity_and_equal_grams_give_fedavg(options):
    sent = states()
    identity = {"fc.weight": torch.eye(5), "conv.weight": torch.eye(12)}
    torch.testing.assert_close(merged(sent, [identity] * 3, **options), average(sent))
    torch.testing.assert_close(merged(sent, [random_grams(sent[0], 1)] * 3, **options), average(sent))


@pytest.mark.parametrize("options", [{}, PAPER])
def test_a_common_factor_on_all_grams_changes_nothing(options):
    sent = states()
    grams = [random_grams(s, i) for i, s in enumerate(sent)]
    small, large = ([{n: f * g for n, g in one.items()} for one in grams] for f in (1e-9, 1e6))
    torch.testing.assert_close(merged(sent, small, **options), merged(sent, large, **options))


def test_full_shrinkage_weighs_each_input_alone():
    sent = states()
    grams = [random_grams(s, i) for i, s in enumerate(sent)]
    got = merged(sent, grams, **(PAPER | {"shrinkage": 0.0}))
    diagonals = [w * g["fc.weight"].diagonal().double() for w, g in zip(WEIGHTS, grams, strict=True)]
    columns = [torch.cat([s["fc.weight"], s["fc.bias"][:, None]], 1) for s in sent]
    wanted = sum(d * c for d, c in zip(diagonals, columns, strict=True)) / sum(diagonals)
    torch.testing.assert_close(torch.cat([got["fc.weight"], got["fc.bias"][:, None]], 1), wanted)


@pytest.mark.parametrize("normalize", ["none", "convolution", "all"])
def test_convolutions_have_a_ridge_and_a_normalisation_of_their_own(normalize):
    """``(sum c W G + ridge d M) (sum c G + ridge d)^-1``, d the mean diagonal of the sum."""
    sent = states()
    grams = [{n: 10.0**i * g for n, g in random_grams(s, i).items()} for i, s in enumerate(sent)]
    got = merged(sent, grams, shrinkage=0.8, ridge=0.2, ridge_convolution=0.7, normalize=normalize)
    for weight, ridge, divided in (("fc.weight", 0.2, ("all",)), ("conv.weight", 0.7, ("all", "convolution"))):
        own = [s[weight].flatten(1).numpy() for s in sent]
        if weight == "fc.weight":
            own = [np.hstack([w, s["fc.bias"].numpy()[:, None]]) for w, s in zip(own, sent, strict=True)]
        full = [g[weight].double().numpy() for g in grams]
        full = [g / np.trace(g) if normalize in divided else g for g in full]
        shares = [c * (0.8 * g + 0.2 * np.diag(np.diag(g))) for c, g in zip(WEIGHTS, full, strict=True)]
        mean = sum(c * w for c, w in zip(WEIGHTS, own, strict=True)) / sum(WEIGHTS)
        total = sum(shares)
        drawn = ridge * np.diag(total).mean() * np.eye(len(total))
        wanted = (sum(w @ g for w, g in zip(own, shares, strict=True)) + mean @ drawn) @ np.linalg.inv(total + drawn)
        np.testing.assert_allclose(got[weight].flatten(1).numpy(), wanted[:, : got[weight][0].numel()], rtol=1e-6)


@pytest.mark.parametrize("options", [PAPER, {}, {"ridge": 1e-12, "shrinkage": 1.0}])
def test_inputs_that_no_client_has_stay_at_the_average(options):
    sent = [{"w": s["fc.weight"]} for s in states()]
    gram = torch.zeros(4, 4)
    gram[:2, :2] = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    got = merged(sent, [{"w": (1 + i) * gram} for i in range(3)], **options)["w"]
    torch.testing.assert_close(got[:, 2:], average(sent)["w"][:, 2:])
    assert torch.isfinite(got).all()
    nothing = merged(sent, [{"w": 0 * gram}] * 3, **options)
    torch.testing.assert_close(nothing, average(sent))


def test_a_client_without_inputs_has_no_say():
    sent = states(2)
    grams = [random_grams(sent[0], 0), {n: 0 * g for n, g in random_grams(sent[1], 1).items()}]
    got = merged(sent, grams, (1.0, 9.0), **PAPER)
    for name in ("fc.weight", "fc.bias", "conv.weight"):
        torch.testing.assert_close(got[name], sent[0][name])


def test_a_layer_that_no_client_measured_is_averaged(caplog):
    sent = states()
    grams = [{n: g for n, g in random_grams(s, i).items() if n != "fc.weight"} for i, s in enumerate(sent)]
    got = merged(sent, grams)
    torch.testing.assert_close(got["fc.weight"], average(sent)["fc.weight"])
    assert "fc.weight" in caplog.text
    assert not torch.allclose(got["conv.weight"], average(sent)["conv.weight"])


def test_a_client_that_lacks_a_layer_is_named():
    sent = states()
    grams = [random_grams(s, i) for i, s in enumerate(sent)]
    del grams[1]["fc.weight"]
    with pytest.raises(BadUpdate, match=r"'fc\.weight' is missing") as caught:
        merged(sent, grams)
    assert caught.value.client == 1


@pytest.mark.parametrize(
    ("gram", "words"),
    [
        (torch.full((5, 5), torch.inf), "NaN or infinite"),
        (torch.eye(3), r"shape \[3, 3\]"),
        (-torch.eye(5), "negative diagonal"),
    ],
)
def test_bad_grams_are_named(gram, words):
    sent = states()
    grams = [random_grams(s, i) for i, s in enumerate(sent)]
    grams[1]["fc.weight"] = gram
    with pytest.raises(BadUpdate, match=words) as caught:
        merged(sent, grams)
    assert caught.value.client == 1


@pytest.mark.parametrize("options", [{"shrinkage": 1.1}, {"ridge": -1.0}, {"normalize": "some"}])
def test_options_out_of_range(options):
    with pytest.raises(InvalidOption):
        build_pipeline("regmean", {"regmean": options})
