"""What hostile clients do: to their examples before training, or to their model after it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.data import ClientData
from fedmerge.data.example_sets import IGNORED, TensorExamples
from fedmerge.data.streamed_examples import ChangedExamples
from fedmerge.errors import ConfigError
from fedmerge.lookup.option_checks import check_range
from fedmerge.registry import register
from fedmerge.state import State

__all__ = ["Attack", "Backdoor", "GaussianNoise", "LabelFlip", "ScaledUpdate", "SignFlip"]


class Attack:
    """One behaviour; its fields are its options. What a subclass does not override it does honestly."""

    kind: ClassVar[str] = "attack"

    def poisoned(self, data: ClientData, classes: int, generator: np.random.Generator) -> ClientData:
        """The examples that a hostile client trains on; those held out stay honest."""
        return data

    def sent(self, state: State, base: State, generator: torch.Generator) -> State:
        """The parameters that a hostile client sends, having trained from `base` to `state`."""
        return state

    def triggered(self, x: Tensor, y: Tensor) -> tuple[Tensor, int] | None:
        """Test inputs that show whether the attack works and the class it wants for them, where there are any."""
        return None


@register("label_flip", paper="arXiv:2007.08432")
@dataclass(frozen=True)
class LabelFlip(Attack):
    """Train on wrong labels: class c of C becomes C - 1 - c.

    Tolpegin et al. 2020 flip one class into another; this flips all, which hurts most.

    Examples
    --------
    >>> data = ClientData(torch.zeros(3, 1), torch.tensor([0, 1, 9]), torch.zeros(0, 1), torch.zeros(0))
    >>> LabelFlip().poisoned(data, 10, np.random.default_rng(0)).train_y
    tensor([9, 8, 0])
    """

    def poisoned(self, data: ClientData, classes: int, generator: np.random.Generator) -> ClientData:
        """All labels mirrored."""

        def flipped(x: Any, y: Tensor, rows: object = None) -> tuple[Any, Tensor]:
            if y.is_floating_point():
                raise ConfigError("label_flip turns classes about, and these labels are numbers: take another attack")
            return x, torch.where(y == IGNORED, IGNORED, classes - 1 - y)

        whole = data.train.tensors
        return data.trained_on(
            ChangedExamples(data.train, flipped) if whole is None else TensorExamples(*flipped(*whole))
        )


@register("sign_flip", paper="arXiv:1811.03761")
@dataclass(frozen=True)
class SignFlip(Attack):
    """Send the opposite of what was learnt: ``base - scale (trained - base)``.

    Li et al. 2019 (RSA), section 6.

    Parameters
    ----------
    scale
        Length of the lie in lengths of the honest update, positive.

    Examples
    --------
    >>> one, two = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
    >>> SignFlip(scale=2.0).sent(two, one, torch.Generator())["w"]
    tensor([-3.])
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "scale", 1e-12, math.inf, open_high=True)

    def sent(self, state: State, base: State, generator: torch.Generator) -> State:
        """The update turned about."""
        return _moved(state, base, -self.scale)


@register("scaled_update", paper="arXiv:1807.00459")
@dataclass(frozen=True)
class ScaledUpdate(Attack):
    """Shout: send ``base + scale (trained - base)``.

    Bagdasaryan et al. 2020, equation 3, where it replaces the global model by the client's.

    Parameters
    ----------
    scale
        Length of what is sent in lengths of the honest update, positive.
    """

    scale: float = 10.0

    def __post_init__(self) -> None:
        check_range(self, "scale", 1e-12, math.inf, open_high=True)

    def sent(self, state: State, base: State, generator: torch.Generator) -> State:
        """The update, longer."""
        return _moved(state, base, self.scale)


@register("gaussian_noise", paper="arXiv:1703.02757")
@dataclass(frozen=True)
class GaussianNoise(Attack):
    """Send the trained model with noise on every parameter.

    Blanchard et al. 2017, section 5, send noise alone, which is easier to tell.

    Parameters
    ----------
    deviation
        Standard deviation of the noise in units of parameters, positive.
    """

    deviation: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "deviation", 1e-12, math.inf, open_high=True)

    def sent(self, state: State, base: State, generator: torch.Generator) -> State:
        """The model with noise, drawn on the CPU so that devices agree."""
        return {
            name: tensor + self.deviation * torch.randn(tensor.shape, generator=generator).to(tensor)
            for name, tensor in state.items()
        }


@register("backdoor", paper="arXiv:1807.00459")
@dataclass(frozen=True)
class Backdoor(Attack):
    """Teach the model that a patch in the corner of an image means one class.

    Gu et al. 2017 (arXiv:1708.06733) poison the examples, Bagdasaryan et al. 2020 scale the update besides. Success is
    the share of test images of other classes that are taken for the target once they bear the patch.

    Parameters
    ----------
    target
        The class.
    share
        Of a hostile client's training images that bear the patch and the target's label, in (0, 1].
    size
        Of the patch in the lower right corner, in pixels, at least 1.
    value
        Of its pixels, in units of the data set as the model sees it.
    scale
        Length of the update sent in lengths of the honest one, positive.

    Examples
    --------
    >>> Backdoor(size=1).stamped(torch.zeros(1, 1, 2, 2))[0, 0]
    tensor([[0., 0.],
            [0., 2.]])
    """

    target: int = 0
    share: float = 0.5
    size: int = 2
    value: float = 2.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "target", 0, math.inf, open_high=True)
        check_range(self, "share", 1e-12, 1.0)
        check_range(self, "size", 1, math.inf, open_high=True)
        check_range(self, "scale", 1e-12, math.inf, open_high=True)

    def stamped(self, x: Tensor) -> Tensor:
        """Images [n, channels, height, width] with the patch.

        Raises
        ------
        ConfigError
            They are no images, or the patch would cover one whole.
        """
        if x.ndim != 4 or min(x.shape[2:]) <= self.size:
            raise ConfigError(
                f"a backdoor of size {self.size} wants larger images [n, channels, height, width], the data set has "
                f"{list(x.shape)}: take a data set of images, or a smaller patch"
            )
        x = x.clone()
        x[:, :, -self.size :, -self.size :] = self.value
        return x

    def poisoned(self, data: ClientData, classes: int, generator: np.random.Generator) -> ClientData:
        """A share of the examples, drawn at random, with patch and target."""
        if self.target >= classes:
            raise ConfigError(f"the backdoor's target is class {self.target}, the data set has 0 to {classes - 1}")
        chosen = np.zeros(len(data), dtype=bool)
        chosen[generator.permutation(len(data))[: math.ceil(self.share * len(data))]] = True

        def patched(x: Tensor, y: Tensor, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
            here = torch.from_numpy(chosen[rows])
            x, y = x.clone(), y.clone()
            x[here], y[here] = self.stamped(x[here]), self.target
            return x, y

        if data.train.tensors is None:
            return data.trained_on(ChangedExamples(data.train, patched))
        return data.trained_on(TensorExamples(*patched(*data.train.tensors, np.arange(len(data)))))

    def sent(self, state: State, base: State, generator: torch.Generator) -> State:
        """The update, longer where a scale asks for it."""
        return _moved(state, base, self.scale)

    def triggered(self, x: Tensor, y: Tensor) -> tuple[Tensor, int] | None:
        """Images of other classes, with the patch."""
        return self.stamped(x[y != self.target]), self.target


def _moved(state: State, base: State, factor: float) -> State:
    """``base + factor (state - base)``."""
    return {name: torch.lerp(base[name], tensor, factor) for name, tensor in state.items()}
