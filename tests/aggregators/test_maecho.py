"""MA-Echo against its iteration written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmerge import ClientUpdate, InvalidOption, MergeContext
from fedmerge.merging import build_pipeline
from fedmerge.statistics.sending import compression
from tests.random_statistics import random_grams

WEIGHTS = (5.0, 1.0, 14.0)
SHARES = np.array(WEIGHTS) / sum(WEIGHTS)
COUNTS = ([5, 0, 0], [0, 1, 0], [5, 9, 0])


def states(count=3):
    generator = torch.Generator().manual_seed(6)
    shapes = {"a.weight": (5, 4), "b.weight": (3, 5)}
    kind = {"generator": generator, "dtype": torch.float64}
    return [{n: torch.randn(s, **kind) for n, s in shapes.items()} for _ in range(count)]


def merged(sent, grams, **options):
    updates = [
        ClientUpdate(i, s, WEIGHTS[i], {"gram": g, "class_counts": {"class_counts": torch.tensor(COUNTS[i])}})
        for i, (s, g) in enumerate(zip(sent, grams, strict=True))
    ]
    return build_pipeline("maecho", {"maecho": options}, on_bad_update="raise").merge(updates, MergeContext()).state


@pytest.mark.parametrize("class_aware", [False, True])
def test_the_iteration(class_aware):
    sent = states()
    grams = [random_grams(s, i) for i, s in enumerate(sent)]
    got = merged(sent, grams, steps=7, step_size=1.2, damping=0.5, class_aware=class_aware)
    for name in ("a.weight", "b.weight"):
        table = np.tile(SHARES[:, None], (1, len(sent[0][name])))
        if class_aware and name == "b.weight":
            table[:, 0], table[:, 1] = [0.5, 0, 0.5], [0, 0.1, 0.9]  # nobody has the third class
        projectors = []
        for g in (one[name].double().numpy() for one in grams):
            projectors.append(np.linalg.inv(g + 0.5 * np.diag(g).mean() * np.eye(len(g))) @ g)
        own = [s[name].numpy() for s in sent]
        w = sum(t[:, None] * x for t, x in zip(table, own, strict=True))
        for _ in range(7):
            w = w - 1.2 * sum(t[:, None] * ((w - x) @ p) for t, x, p in zip(table, own, projectors, strict=True))
        np.testing.assert_allclose(got[name].numpy(), w, rtol=1e-6, atol=1e-9)


def test_no_step_is_fedavg_and_equal_grams_stay_there():
    sent = states()
    mean = {n: sum(p * s[n] for p, s in zip(SHARES, sent, strict=True)) for n in sent[0]}
    grams = [random_grams(s, i) for i, s in enumerate(sent)]
    torch.testing.assert_close(merged(sent, grams, steps=0, class_aware=False), mean)
    torch.testing.assert_close(merged(sent, [grams[0]] * 3, class_aware=False), mean)


def test_a_client_without_a_class_has_no_say_in_its_row():
    sent = states()
    grams = [random_grams(s, i) for i, s in enumerate(sent)]
    one = merged(sent, grams)["b.weight"]
    sent[1]["b.weight"][0] += 100.0  # client 1 has no example of class 0
    two = merged(sent, grams)["b.weight"]
    torch.testing.assert_close(one[0], two[0])
    sent[2]["b.weight"][0] += 100.0
    assert (merged(sent, grams)["b.weight"][0] - one[0]).abs().max() > 1


def test_inputs_that_no_client_has_stay_at_the_average():
    sent = states()
    gram = torch.zeros(4, 4)
    gram[0, 0] = 1.0
    got = merged(sent, [{"a.weight": (1 + i) * gram} for i in range(3)])["a.weight"]
    mean = sum(p * s["a.weight"] for p, s in zip(SHARES, sent, strict=True))
    torch.testing.assert_close(got[:, 1:], mean[:, 1:])


@pytest.mark.parametrize("options", [{"steps": -1}, {"step_size": 2.0}, {"damping": 0.0}])
def test_options_out_of_range(options):
    with pytest.raises(InvalidOption):
        build_pipeline("maecho", {"maecho": options})


@pytest.mark.parametrize("damping", [1.0, 1e-3])
def test_grams_rounded_for_the_wire_do_not_diverge(damping):
    generator = torch.Generator().manual_seed(8)
    sent = [{"a.weight": torch.randn(4, 300, generator=generator, dtype=torch.float64)} for _ in range(3)]
    inputs = torch.rand(3, 5, 300, generator=generator)  # fewer examples than columns: most eigenvalues are 0
    exact = [{"a.weight": x.T @ x / 5} for x in inputs]
    rounded = [compression.decode(compression.encode(g, "float16", 0).state) for g in exact]
    assert any((g["a.weight"] - e["a.weight"]).abs().max() > 1e-5 for g, e in zip(rounded, exact, strict=True))
    mean = sum(p * s["a.weight"] for p, s in zip(SHARES, sent, strict=True))
    options = {"damping": damping, "class_aware": False, "steps": 200}
    want, got = (merged(sent, g, **options)["a.weight"] for g in (exact, rounded))
    assert (got - want).norm() < 0.2 * (want - mean).norm()
