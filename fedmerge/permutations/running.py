"""Models run for proofs: a copy in eval mode, random draws repeated, nothing outside touched."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge.inputs import arguments_of, changed, examples_in, rows, tensors_of
from fedmerge.models.resize import copy_of

__all__ = ["copied", "few_rows", "repeated", "undisturbed"]


def copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode, to be run and exported in the model's place: some models change when they are run."""
    return copy_of(model).eval()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever a model draws or warns of within leaves no trace outside; fused layers run operator by operator."""
    fast = torch.backends.mha.get_fastpath_enabled()
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  (the model's own draws, not ours)
    checks = torch.distributions.Distribution._validate_args  # checks of values, which no export can follow
    torch.distributions.Distribution.set_default_validate_args(False)
    torch.backends.mha.set_fastpath_enabled(False)  # the fused transformer layer would be one opaque operator
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.random.fork_rng():
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.distributions.Distribution.set_default_validate_args(checks)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def repeated(seed: int = 0) -> None:
    """Have what a model draws next be what it drew after the last such call; only within :func:`undisturbed`."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def few_rows(model: nn.Module, example: Any) -> Any:
    """Two rows of an example where these say what more would, else all of it.

    The first axis is a batch if two rows give what they give beside a third. It need not be one: it may be that of
    nodes of a graph, of time, or examples that are normalised together.

    Parameters
    ----------
    model
        A copy to run, on its own device.
    example
        On the same device.
    """
    if examples_in(example) <= 2:
        return example
    two, three = rows(example, slice(2)), rows(example, slice(3))
    try:
        with torch.no_grad():
            some, more = (_outputs(model, nest) for nest in (two, three))
    except Exception:  # of any kind: a model may check its inputs as it likes
        return example
    return two if some and len(some) == len(more) and all(map(_begins_with, more, some)) else example


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    repeated()
    args, kwargs = arguments_of(model, changed(example, Tensor.clone))
    return tensors_of(model(*args, **kwargs))


def _begins_with(more: Tensor, some: Tensor) -> bool:
    if some.ndim == 0 or len(more) == len(some) or more.shape[1:] != some.shape[1:]:
        return False
    first, other = more[: len(some)], some
    if not (some.is_floating_point() or some.is_complex()):
        return torch.equal(first, other)
    near = torch.finfo(some.dtype).eps ** 0.5
    size = float(other.abs().nan_to_num(0, 0, 0).max()) if other.numel() else 0.0
    return torch.allclose(first, other, rtol=near, atol=near * size, equal_nan=True)
