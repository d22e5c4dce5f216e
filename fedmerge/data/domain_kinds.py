"""What a domain does to images: turn them, add noise, blur them, take contrast away, invert them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmerge.errors import InvalidOption
from fedmerge.registry import register

__all__ = ["Domain"]


class Domain(ABC):
    """One condition under which images are taken; subclasses are frozen dataclasses, whose fields are options."""

    kind: ClassVar[str] = "domain"
    name: ClassVar[str] = ""

    def spread(self) -> tuple[Domain, ...]:
        """The domains that it stands for: itself, or all of a set."""
        return (self,)

    @abstractmethod
    def change(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Images [n, channels, height, width] as they look in this domain; `seeds` has one for each."""


class _Set(Domain):
    """Several domains under one name."""

    def change(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """None of its own: it stands for others."""
        raise NotImplementedError


@register("original")
@dataclass(frozen=True)
class Original(Domain):
    """Images as they are."""

    name: ClassVar[str] = "original"

    def change(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """The same."""
        return images


@register("rotation")
@dataclass(frozen=True)
class Rotation(Domain):
    """Images turned against the clock by `degrees`; corners that come in are as dark as an image's darkest pixel.

    Quarters of a turn of square images are exact, all else is interpolated between pixels.
    """

    name: ClassVar[str] = "rotation"
    degrees: float = 90.0

    def __post_init__(self) -> None:
        _check(math.isfinite(self.degrees), self, "degrees", "a finite number")

    def change(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Turned."""
        height, width = images.shape[2:]
        if self.degrees % 90 == 0 and height == width:
            return torch.rot90(images, int(self.degrees // 90) % 4, (2, 3))
        angle = math.radians(self.degrees)
        cos, sin = math.cos(angle), math.sin(angle)
        # Places run from -1 to 1 in both directions, so a turn has to undo the sides' ratio.
        matrix = images.new_tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]])
        grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
        darkest = images.amin((2, 3), keepdim=True)
        return F.grid_sample(images - darkest, grid, align_corners=False) + darkest


@register("gaussian_noise", paper="arXiv:1903.12261")
@dataclass(frozen=True)
class GaussianNoise(Domain):
    """Normal noise on every pixel, of standard deviation `std` in units of the normalised inputs."""

    name: ClassVar[str] = "gaussian_noise"
    std: float = 0.5

    def __post_init__(self) -> None:
        _check(0 < self.std < math.inf, self, "std", "a finite number above 0")

    def change(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """With noise."""
        generator, noise = torch.Generator(), torch.empty_like(images, device="cpu")
        for i, seed in enumerate(seeds):
            noise[i].normal_(0.0, self.std, generator=generator.manual_seed(seed))
        return images + noise.to(images.device)


@register("blur", paper="arXiv:1903.12261")
@dataclass(frozen=True)
class Blur(Domain):
    """Convolution with a normal density of standard deviation `sigma` in pixels, cut at three of them."""

    name: ClassVar[str] = "blur"
    sigma: float = 1.0

    def __post_init__(self) -> None:
        _check(0 < self.sigma <= 100, self, "sigma", "above 0 and at most 100 pixels")

    def change(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Blurred."""
        reach = math.ceil(3 * self.sigma)
        places = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
        kernel = torch.exp(-(places**2) / (2 * self.sigma**2))
        kernel, channels = kernel / kernel.sum(), images.shape[1]
        padded = F.pad(images, (reach,) * 4, mode="replicate")
        down = F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(down, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


@register("contrast", paper="arXiv:1903.12261")
@dataclass(frozen=True)
class Contrast(Domain):
    """Each image's pixels drawn towards their mean: ``mean + factor (pixel - mean)``, by channel."""

    name: ClassVar[str] = "contrast"
    factor: float = 0.3

    def __post_init__(self) -> None:
        _check(0 < self.factor < math.inf, self, "factor", "a finite number above 0")

    def change(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """With less contrast, or more."""
        mean = images.mean((2, 3), keepdim=True)
        return mean + self.factor * (images - mean)


@register("inverted")
@dataclass(frozen=True)
class Inverted(Domain):
    """Dark is bright: ``darkest + brightest - pixel``, by image and channel."""

    name: ClassVar[str] = "inverted"

    def change(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Inverted."""
        return images.amin((2, 3), keepdim=True) + images.amax((2, 3), keepdim=True) - images


@register("rotated")
@dataclass(frozen=True)
class Rotated(_Set):
    """A full turn in equal `steps`: with 4 by 0, 90, 180 and 270 degrees."""

    name: ClassVar[str] = "rotated"
    steps: int = 4

    def __post_init__(self) -> None:
        _check(2 <= self.steps <= 360, self, "steps", "a whole number from 2 to 360")

    def spread(self) -> tuple[Domain, ...]:
        """One domain for each step."""
        return tuple(Rotation(360.0 * step / self.steps) for step in range(self.steps))


@register("corrupted")
@dataclass(frozen=True)
class Corrupted(_Set):
    """Four corruptions, each as it is by default: noise, blur, little contrast, inverted."""

    name: ClassVar[str] = "corrupted"

    def spread(self) -> tuple[Domain, ...]:
        """The four."""
        return GaussianNoise(), Blur(), Contrast(), Inverted()


def _check(valid: bool, domain: Domain, option: str, wanted: str) -> None:
    if not valid:
        raise InvalidOption(f"domain {domain.name}: {option} = {getattr(domain, option)} must be {wanted}")
