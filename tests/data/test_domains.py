"""Domains of images: what each does, that it is drawn by the seed, and who gets which."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedmerge.data.client_data import examples_of
from fedmerge.data.domain_kinds import Domain
from fedmerge.data.domains import domain_name, domains_of_tests, in_domains, make_domains
from fedmerge.errors import DataError, InvalidOption, UnknownName


def images(n=3, size=(5, 5), channels=2):
    return torch.from_numpy(np.random.default_rng(0).normal(size=(n, channels, *size)).astype(np.float32))


def changed(written, x, seeds=None):
    (domain,) = make_domains([written])
    return domain.change(x, seeds or list(range(len(x))))


def test_four_quarters_are_a_full_turn_and_one_is_numpy_s():
    x = images()
    y = x
    for _ in range(4):
        y = changed("rotation(degrees=90)", y)
    assert y.equal(x)
    assert changed("rotation(degrees=90)", x).numpy().tolist() == np.rot90(x.numpy(), axes=(2, 3)).tolist()


def test_a_turn_by_interpolation_is_the_exact_one_at_a_quarter():
    x = images(size=(6, 6))
    almost = changed("rotation(degrees=90.0001)", x)
    assert (almost - changed("rotation(degrees=90)", x)).abs().max() < 1e-3
    dark = changed("rotation(degrees=45)", torch.ones(1, 1, 9, 9) * -2 + torch.eye(9))
    assert dark.min() >= -2 - 1e-6  # corners that come in are as dark as the darkest pixel


def test_a_turn_of_half_works_on_images_that_are_not_square():
    x = images(size=(4, 6))
    assert (changed("rotation(degrees=180)", x) - x.flip((2, 3))).abs().max() < 1e-5


def test_noise_is_drawn_by_each_example_s_seed():
    x = images(n=4, size=(40, 40))
    noise = changed("gaussian_noise(std=0.2)", x, [3, 4, 5, 6]) - x
    assert abs(float(noise.std()) - 0.2) < 0.01
    assert changed("gaussian_noise(std=0.2)", x[2:3], [5]).equal(x[2:3] + noise[2:3]) or torch.allclose(
        changed("gaussian_noise(std=0.2)", x[2:3], [5]) - x[2:3], noise[2:3]
    )
    assert not torch.allclose(noise[0], noise[1])


def test_blur_is_a_normal_density_and_keeps_flat_images():
    point = torch.zeros(1, 1, 15, 15)
    point[0, 0, 7, 7] = 1
    found = changed("blur(sigma=1.5)", point)[0, 0]
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    line /= line.sum()
    assert np.allclose(found[2:13, 2:13].numpy(), np.outer(line, line), atol=1e-6)
    assert torch.allclose(changed("blur", torch.full((1, 3, 4, 4), 2.0)), torch.full((1, 3, 4, 4), 2.0))


def test_contrast_and_inversion():
    x = images()
    low = changed("contrast(factor=0.5)", x)
    assert torch.allclose(low.mean((2, 3)), x.mean((2, 3)), atol=1e-6)
    assert torch.allclose(low.std((2, 3)), 0.5 * x.std((2, 3)), atol=1e-6)
    y = changed("inverted", x)
    assert torch.allclose(y.amax((2, 3)), x.amax((2, 3)), atol=1e-6)
    assert y.flatten(2).argmax(2).equal(x.flatten(2).argmin(2))


def test_sets_stand_for_their_domains():
    assert [one.degrees for one in make_domains(["rotated"])] == [0, 90, 180, 270]
    assert [domain_name(one).partition("(")[0] for one in make_domains(["original", "corrupted"])] == [
        "original",
        "gaussian_noise",
        "blur",
        "contrast",
        "inverted",
    ]


@pytest.mark.parametrize(
    ("written", "error"),
    [
        (["blurr"], UnknownName),
        (["blur(sgma=1)"], UnknownName),
        (["blur(sigma=0)"], InvalidOption),
        (["rotated(steps=1)"], InvalidOption),
        (["contrast(factor=nan)"], InvalidOption),
        (["blur+inverted"], InvalidOption),
        (["rotated", "rotation(degrees=90)"], InvalidOption),
    ],
)
def test_domains_that_there_are_not_are_refused(written, error):
    with pytest.raises(error):
        make_domains(written)


@dataclass(frozen=True)
class Darker(Domain):
    by: float = 1.0

    def change(self, images, seeds):
        return images - self.by


@dataclass(frozen=True)
class NoDomain:
    pass


def test_a_domain_of_one_s_own_goes_by_module_and_name():
    (own,) = make_domains([f"{__name__}:Darker(by=0.5)"])
    assert own.change(torch.ones(1, 1, 1, 1), [0]).item() == 0.5
    assert domain_name(own) == "Darker(by=0.5)"
    with pytest.raises(InvalidOption, match="subclass of"):
        make_domains([f"{__name__}:NoDomain"])


def test_examples_look_the_same_in_memory_and_read_batch_by_batch():
    x, y = images(n=6), torch.arange(6)
    domains, which = make_domains(["gaussian_noise", "inverted"]), torch.tensor([0, 1, 0, 1, 0, 1])
    rows = torch.arange(10, 16)
    held = in_domains(examples_of(x, y), domains, which, rows, 5, "train")
    read = in_domains(examples_of(list(zip(x, y, strict=True))), domains, which, rows, 5, "train")
    assert held.tensors is not None
    assert read.tensors is None
    some = np.array([4, 1])
    assert torch.allclose(held.take(some)[0], read.take(some)[0])
    assert torch.allclose(held.subset(torch.tensor([4, 1])).take(np.array([0, 1]))[0], held.take(some)[0])
    assert torch.allclose(read.subset(torch.tensor([4, 1])).take(np.array([0, 1]))[0], held.take(some)[0])
    assert read.take(some)[1].tolist() == [4, 1]
    other = in_domains(examples_of(x, y), domains, which, rows, 6, "train").tensors[0]
    assert not torch.allclose(other[0], held.tensors[0][0])
    assert other[1].equal(held.tensors[0][1])


def test_what_is_no_image_is_refused():
    with pytest.raises(DataError, match="domains are for images"):
        in_domains(
            examples_of(torch.zeros(3, 4), torch.zeros(3)),
            make_domains(["blur"]),
            torch.zeros(3),
            torch.arange(3),
            0,
            "train",
        )


def test_each_domain_has_its_share_of_the_tests():
    found = domains_of_tests(10, 4, seed=1)
    assert sorted(found.bincount().tolist()) == [2, 2, 3, 3]
    assert found.equal(domains_of_tests(10, 4, seed=1))
    assert not found.equal(domains_of_tests(10, 4, seed=2))
