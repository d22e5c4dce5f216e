"""Models in safetensors files: finding an architecture that they fit, and an example that it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.checks.mergeable import check_mergeable
from fedmerge.errors import ConfigError, DataError, FedMergeError, ModelError
from fedmerge.models import build_model
from fedmerge.models.resize import resize
from fedmerge.models.state_fit import check_kinds, tied_tensors
from fedmerge.offline.tensor_files import FileNames
from fedmerge.records.model_tensors import read_tensors
from fedmerge.seeding import torch_generator
from fedmerge.state import State, is_uninitialised, module_state

__all__ = ["Architecture", "read_inputs"]

# Of MNIST, scikit-learn's digits, CIFAR-10: what to try where nobody says what a model takes.
USUAL_SHAPES = ((1, 28, 28), (1, 8, 8), (3, 32, 32))
USUAL_CLASSES = 10  # only to build with: widths are those of the files then
EXAMPLES = 8


def read_inputs(file: Path) -> tuple[Tensor, Tensor | None]:
    """Tensor ``inputs`` of a file, and ``targets`` where it has them.

    Raises
    ------
    DataError
        The file is missing or no safetensors; it has no inputs, or targets of another number.
    """
    tensors = read_tensors(file, DataError)
    inputs, targets = tensors.get("inputs"), tensors.get("targets")
    if inputs is None or inputs.ndim < 2 or not len(inputs):
        held = ", ".join(f"{name} {list(t.shape)}" for name, t in list(tensors.items())[:5]) or "nothing"
        raise DataError(f"{file} must hold a tensor 'inputs' of shape [examples, ...]; it holds {held}")
    if targets is not None and (targets.ndim == 0 or len(targets) != len(inputs)):
        raise DataError(f"{file}: 'targets' has shape {list(targets.shape)} for {len(inputs)} inputs")
    return inputs, targets


@dataclass(frozen=True)
class Architecture:
    """A model at some width, and a batch of inputs that it takes."""

    name: str
    built: nn.Module
    example: Tensor
    classes: int | None
    names: FileNames = field(default_factory=FileNames)

    @classmethod
    def find(
        cls,
        name: str,
        options: Mapping[str, Any],
        shape: tuple[int, ...] | None,
        classes: int | None,
        inputs: Tensor | None,
        fit: tuple[Path, State],
        *,
        seed: int,
        names: FileNames | None = None,
    ) -> Architecture:
        """Build the model `name` so that the file and state `fit` go into it, but for buffers that `names` ignores.

        Raises
        ------
        ModelError
            The names do not fit, or the model takes no input of this shape, or of any shape tried.
        """
        if shape is not None and inputs is not None and shape != inputs.shape[1:]:
            raise ModelError(
                f"the input shape is {list(shape)}, that of the data {list(inputs.shape[1:])}: leave it out"
            )
        if shape is not None and not all(size > 0 for size in shape):
            raise ModelError(
                f"the input shape must be sizes above 0 of one example, such as 1,28,28; got {list(shape)}"
            )
        known = shape if inputs is None else tuple(inputs.shape[1:])
        shapes = [known] if known is not None else [*USUAL_SHAPES, *_flat_shapes(fit[1])]
        errors: list[ModelError] = []
        for tried in shapes:
            for example in _examples(tried, seed) if inputs is None else [inputs[:EXAMPLES]]:
                try:
                    built = _ready(name, _build(name, tried, classes, options), example)
                    architecture = cls(name, built, example, classes, names or FileNames())
                    architecture.module(*fit)
                except ModelError as error:
                    errors.append(error)
                else:
                    return architecture
        if known is not None or not any(isinstance(error, _TakesNoInput) for error in errors):
            raise errors[0]
        raise ModelError(
            f"{name} with the tensors of {fit[0]} takes none of the inputs tried ({', '.join(map(str, shapes))}): "
            "name the shape of one example with --input-shape"
        )

    def module(self, file: Path, state: State) -> nn.Module:
        """The model with the widths and values of a file.

        Raises
        ------
        ModelError
            Names do not fit, or it does not run on the example.
        ConfigError
            It has another number of classes than was asked for.
        """
        whole = {**self.names.kept_of(self.built), **tied_tensors(file, self.built, state), **state}
        check_kinds(file, self.built, state)
        try:
            module = resize(self.built, whole).eval()
        except (ModelError, RuntimeError) as error:
            raise ModelError(
                f"{file}: {error}. Its architecture must be --model {self.name}; what is no width, such as the number "
                "of layers, goes by --set model.option=value"
            ) from error
        try:
            with torch.no_grad():
                output = module(self.example)
        except Exception as error:  # a forward may raise anything
            raise _TakesNoInput(
                f"{file}: {self.name} with these tensors does not take {self.example.dtype} inputs of shape "
                f"{list(self.example.shape[1:])} ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
                ": name the shape of one example with --input-shape"
            ) from error
        if self.classes is not None and isinstance(output, Tensor) and output.shape[-1] != self.classes:
            raise ConfigError(f"{file} gives {output.shape[-1]} logits, not {self.classes}: mend --classes")
        return module


class _TakesNoInput(ModelError):
    """A model does not run on an example."""


def _build(name: str, shape: tuple[int, ...], classes: int | None, options: Mapping[str, Any]) -> nn.Module:
    try:
        return build_model(name, shape, classes or USUAL_CLASSES, seed=0, **options)
    except FedMergeError:
        raise
    except Exception as error:  # a person's own factory may raise anything
        raise ModelError(f"model {name!r} cannot be built for inputs of shape {list(shape)}: {error!r}") from error


def _ready(name: str, module: nn.Module, example: Tensor) -> nn.Module:
    """The model with shapes and places for all its tensors: lazy layers have theirs once they have seen an example."""
    if any(map(is_uninitialised, [*module.parameters(), *module.buffers()])):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                module.eval()(example)
        except Exception as error:  # a forward may raise anything
            raise _TakesNoInput(
                f"{name}, whose layers are lazy, does not take inputs of shape {list(example.shape[1:])} "
                f"({type(error).__name__}): name the shape of one example with --input-shape"
            ) from error
    check_mergeable(f"model {name!r}", module_state(module)[0])
    return module


def _flat_shapes(state: State) -> list[tuple[int, ...]]:
    """Shapes of flat inputs: the columns of each matrix, one of which may be the first layer."""
    return list(dict.fromkeys((t.shape[1],) for t in state.values() if t.ndim == 2))


def _examples(shape: Sequence[int], seed: int) -> Iterator[Tensor]:
    """A random batch, and one of whole numbers for models of text."""
    generator = torch_generator(seed, "example")
    yield torch.randn(EXAMPLES, *shape, generator=generator)
    yield torch.randint(0, 2, (EXAMPLES, *shape), generator=generator)
