"""Factors that travel rounded stay positive semi-definite, and a merge by them stays what it was."""

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.offline.compute import compute_statistics
from fedmerge.statistics import FisherKfac, Gram
from fedmerge.statistics.sending.compression import decode, encode
from fedmerge.statistics.sending.soundness import definite, is_definite

SCALES = {"[-1, 1]": (2.0, -1.0), "[0, 1]": (1.0, 0.0), "[0, 255]": (255.0, 0.0)}


def pictures(scale, seed=0, count=60):
    """Smooth pictures with a dark border, whose pixels are strongly correlated."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 3, 3, generator=generator) ** 4
    x = nn.functional.pad(nn.functional.interpolate(coarse, size=(6, 6), mode="bilinear"), (2, 2, 2, 2))
    factor, shift = SCALES[scale]
    return x * factor + shift, (coarse.flatten(1).argmax(1) % 4)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(216, 20), nn.ReLU(), nn.Linear(20, 4))


def lowest(tensor):
    values = torch.linalg.eigvalsh(tensor.double())
    return float((values.amin(-1) / values.amax(-1).clamp_min(1e-300)).min())


def matrices(value):
    return {n: t for n, t in value.items() if t.ndim > 1 and t.shape[-1] == t.shape[-2] and not n.endswith("diag")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [FisherKfac(), Gram()])
@pytest.mark.parametrize("scale", SCALES)
def test_factors_that_travel_in_float16_stay_positive_semidefinite(scale, kind, dtype):
    x, y = pictures(scale)
    value = kind.measure(network().to(dtype), [(x.to(dtype), y)], None)
    sent = encode(value, "float16", 0)
    assert sent.error < 1e-3
    found = matrices(decode(sent.state))
    assert len(found) == (6 if kind.name == "fisher_kfac" else 3)
    for name, tensor in found.items():
        assert tensor.isfinite().all()
        assert lowest(tensor) > -1e-12, name
        torch.testing.assert_close(tensor.diagonal().float(), value[name].diagonal().float(), rtol=0.01, atol=0)


def test_rounding_alone_would_not_do():
    x, y = pictures("[-1, 1]")
    factor = Gram().measure(nn.Sequential(nn.Flatten(), nn.Linear(100, 4)), [(x, y)], None)["1.weight"]
    root = factor.diagonal().sqrt()
    rounded = (factor / (root[:, None] * root)).half()
    assert lowest(rounded) < -1e-6
    assert lowest(definite(rounded[None])) > -1e-12


@pytest.mark.parametrize(
    ("method", "kind"), [("fedfisher", "fisher_kfac"), ("regmean", "gram"), ("fedlpa", "fisher_kfac")]
)
@pytest.mark.parametrize("scale", SCALES)
def test_a_merge_by_rounded_factors_is_near_that_by_whole_ones(scale, method, kind, caplog):
    models, exact, rounded = [], [], []
    for i in range(3):
        x, y = pictures(scale, seed=i)
        model = network()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
                parameter.add_(0.3 * parameter.std() * noise)
        models.append(model)
        value = compute_statistics(model, [(x, y)], [kind])[kind]
        exact.append({kind: value})
        rounded.append({kind: decode(encode(value, "float16", 0).state)})

    def merged(statistics):
        return nn.utils.parameters_to_vector(fedmerge.merge(models, method, statistics=statistics).parameters())

    mean = nn.utils.parameters_to_vector(fedmerge.merge(models).parameters())
    whole = merged(exact)
    assert (merged(rounded) - whole).norm() < 0.15 * (whole - mean).norm()
    assert "not positive semidefinite" not in caplog.text


def test_projection_brings_a_rounded_matrix_nearer_to_what_it_was():
    rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = nn.functional.normalize(rows, dim=1)
    whole = (rows @ rows.T)[None]
    rounded = whole.half().double()
    found = definite(rounded)
    assert (found - whole).norm() < (rounded - whole).norm()
    assert is_definite(found, 1e-12)


def test_large_matrices_are_shifted(monkeypatch):
    monkeypatch.setattr("fedmerge.statistics.sending.soundness._EXACT", 10)
    rows = nn.functional.normalize(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), dim=1).double()
    rounded = (rows @ rows.T)[None].half()
    found = definite(rounded)
    assert lowest(found.float()) > 0
    assert (found - rounded.double()).norm() < 0.01 * rounded.double().norm()


def test_what_was_definite_keeps_its_bits_and_what_was_not_stays_so():
    good = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    back = decode(encode({"a": good}, "float16", 0).state)["a"]
    assert torch.equal(back.diagonal(), good.diagonal())
    torch.testing.assert_close(back, good, rtol=3e-4, atol=0)
    indefinite = torch.tensor([[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]])  # as noise makes of moments
    back = decode(encode({"a": indefinite, "b": torch.stack([indefinite] * 2)}, "float16", 0).state)
    torch.testing.assert_close(back["a"], indefinite, rtol=0, atol=1e-3)
    torch.testing.assert_close(back["b"][1], indefinite, rtol=0, atol=1e-3)


def test_a_neuron_that_is_silent_stays_so():
    matrix = torch.zeros(3, 3)
    matrix[:2, :2] = 4.0
    back = decode(encode({"a": matrix}, "float16", 0).state)["a"]
    torch.testing.assert_close(back, matrix, rtol=1e-6, atol=0, check_dtype=False)


def test_what_is_within_the_reach_of_rounding_noise_is_cut_and_what_is_beyond_stays():
    """Entries off by up to 2**-12: eigenvalues of such noise reach ``2**-12 sqrt(4 d / 3)``."""
    reach = 2.0**-12 * (4 * 4 / 3) ** 0.5
    vectors = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    values = torch.tensor([-0.5 * reach, 0.9 * reach, 1.1 * reach, 1.5], dtype=torch.float64)
    found = definite((vectors * values @ vectors.T)[None])
    kept = (vectors.T @ found[0] @ vectors).diagonal()
    torch.testing.assert_close(kept, torch.where(values > reach, values, 2.0**-48), rtol=1e-6, atol=1e-12)
