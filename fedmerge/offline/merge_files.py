"""Merging models that lie in files: what ``fedmerge merge`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedmerge.checks.mergeable import check_mergeable
from fedmerge.errors import BadUpdate, ConfigError, InvalidOption, ModelError, RecordError
from fedmerge.lookup.method_names import parse_value
from fedmerge.matching.widths import ALL_BUT
from fedmerge.merging import build_pipeline, main_part
from fedmerge.offline.merge import merge
from fedmerge.offline.model_files import Architecture, read_inputs
from fedmerge.records.model_tensors import read_state
from fedmerge.records.run_records import write_tensors
from fedmerge.registry import entries
from fedmerge.state import State, is_extra, tied_names

__all__ = ["merge_files", "numbers"]

BATCH = 256  # examples of --data that a method sees at a time
MODEL_PREFIX = "model."  # of a --set that is meant for the architecture

Number = TypeVar("Number", int, float)


def merge_files(
    files: Sequence[Path],
    out: Path,
    *,
    model: str,
    method: str = "fedavg",
    weights: Sequence[float] | None = None,
    input_shape: Sequence[int] | None = None,
    classes: int | None = None,
    data: Path | None = None,
    base: Path | None = None,
    settings: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Merge the models of several safetensors files into a new file.

    Parameters
    ----------
    files
        A ``state_dict`` each, or a checkpoint of a run; widths may differ where the method can merge such.
    out
        Written under a temporary name and renamed; tensors have the dtypes of the first file.
    model
        A name of :func:`~fedmerge.models.model_names`, or ``module:factory``.
    method, weights, seed
        As for :func:`fedmerge.merge`.
    input_shape
        Of one example. Without it, the shape of the data, or else the first of usual shapes that the model takes.
    classes
        Checked against the files where it is given.
    data
        A safetensors file with a tensor ``inputs`` [n, ...], and ``targets`` [n] where the method uses labels.
    base
        The model that all started from, for methods that merge updates.
    settings
        Options of the method as ``option=value``, of the model as ``model.option=value``.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    FedMergeError
        A file is missing, damaged or does not fit the model; an option or a name does not exist; the method
        cannot do with what files hold.

    Examples
    --------
    >>> import tempfile
    >>> from fedmerge.models import build_model
    >>> folder = Path(tempfile.mkdtemp())
    >>> for seed in (0, 1):
    ...     write_tensors(folder / f"{seed}.safetensors", build_model("mlp", (1, 8, 8), 10, seed=seed).state_dict())
    >>> merge_files([folder / "0.safetensors", folder / "1.safetensors"], folder / "merged.safetensors",
    ...             model="mlp", method="otfusion").name
    'merged.safetensors'
    """
    if len(files) < (2 if base is None else 1):
        raise ConfigError(f"{len(files)} file to merge: name two or more, or one and the --base that it started from")
    if out.is_dir():
        raise RecordError(f"{out} is a folder: name the file to write, such as {out / 'merged.safetensors'}")
    chosen, model_options = _split(settings)
    _check_method(method, chosen, base)
    states = [_read(file) for file in files]
    inputs, targets = (None, None) if data is None else read_inputs(data)
    given = tuple(input_shape) if input_shape is not None else None
    found = Architecture.find(model, model_options, given, classes, inputs, (files[0], states[0]), seed=seed)
    modules = [found.module(file, state) for file, state in zip(files, states, strict=True)]
    _check_widths(method, files, states)  # once it is clear that names fit, which is the worse mistake
    try:
        merged = merge(
            modules,
            method,
            weights=weights,
            base=None if base is None else found.module(base, _read(base)),
            data=None if inputs is None else _batches(inputs, targets),
            example=found.example,
            seed=seed,
            **chosen,
        )
    except BadUpdate as bad:  # people know files, not numbers of clients
        where = files[bad.client] if isinstance(bad.client, int) else bad.client
        raise ModelError(f"{where}: {bad.reason}. {bad.remedy}") from bad
    return _written(out, merged, states[0], {"format": "pt", "model": model, "method": method})


def numbers(text: str | None, option: str, kind: Callable[[str], Number]) -> list[Number] | None:
    """Numbers written with commas between them; None stays None.

    Raises
    ------
    ConfigError
        One is none.

    Examples
    --------
    >>> numbers("1,28,28", "--input-shape", int)
    [1, 28, 28]
    """
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} wants numbers with commas between them, such as 3,1; got {text!r}") from error


def _read(file: Path) -> dict[str, Tensor]:
    state = read_state(file)
    check_mergeable(str(file), state)
    return state


def _split(settings: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the method and of the model."""
    chosen: dict[str, Any] = {}
    for_model: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"--set wants option=value, or model.option=value, got {text!r}")
        target = for_model if key.startswith(MODEL_PREFIX) else chosen
        target[key.removeprefix(MODEL_PREFIX)] = parse_value(value.strip())
    return chosen, for_model


def _check_method(method: str, chosen: Mapping[str, Any], base: Path | None) -> None:
    """Refuse, before any file is read, what cannot work."""
    pipeline = build_pipeline(method, {main_part(method).name: chosen})
    if pipeline.needs:
        raise InvalidOption(
            f"{method} needs what clients measure ({', '.join(pipeline.needs)}), which files of weights do not hold: "
            "call fedmerge.merge(models, ..., clients=loaders) in Python"
        )
    asking = [type(one).__name__ for one in pipeline.refinements]
    if asking:
        raise InvalidOption(
            f"{method}: {', '.join(asking)} asks clients about the merged model, whom files of weights do not bring: "
            "call fedmerge.merge(models, ..., clients=loaders) in Python, or leave it out"
        )
    if base is None and (pipeline.aggregator.requires_base or pipeline.server_steps or pipeline.edits):
        raise InvalidOption(f"{method} merges updates of a common model: name its file with --base")


def _check_widths(method: str, files: Sequence[Path], states: Sequence[State]) -> None:
    if build_pipeline(method).aggregator.may_change_width:
        return
    for file, state in zip(files, states, strict=True):
        for name, tensor in state.items():
            first = states[0].get(name, tensor)
            if first.shape != tensor.shape:
                able = ", ".join(known for known, found in entries("aggregator").items() if found.cls.may_change_width)
                raise ModelError(
                    f"{file}: {name!r} has shape {list(tensor.shape)}, in {files[0]} {list(first.shape)}, and {method} "
                    f"merges models of equal widths. Methods for unequal hidden ones: {able}. {ALL_BUT}"
                )


def _batches(inputs: Tensor, targets: Tensor | None) -> list[Any]:
    parts = torch.split(inputs, BATCH)
    return list(parts) if targets is None else list(zip(parts, torch.split(targets, BATCH), strict=True))


def _written(out: Path, merged: nn.Module, like: State, metadata: Mapping[str, str]) -> Path:
    own = {n: t for n, t in merged.state_dict().items() if not is_extra(n)}
    # A tensor that the file has under one of its names has the precision of that one under the others too.
    groups: dict[str, list[str]] = {}
    for name, first in tied_names(merged).items():
        groups.setdefault(first, [first]).append(name)
    dtypes = {name: tensor.dtype for name, tensor in like.items()}
    for names in groups.values():
        known = next((dtypes[name] for name in names if name in dtypes), None)
        dtypes |= {name: known for name in names if known is not None and name not in dtypes}
    # A copy each: safetensors refuses tensors that share memory, as tied weights do.
    state = {n: t.to(dtypes.get(n, t.dtype), copy=True) for n, t in own.items()}
    for name, tensor in state.items():
        if not _holds(tensor, own[name]):
            raise ModelError(
                f"{name!r} of the merged model does not fit into {tensor.dtype}, which the first file has: "
                f"name a file first whose tensors are {own[name].dtype}"
            )
    write_tensors(out, state, metadata)
    return out


def _holds(written: Tensor, merged: Tensor) -> bool:
    """Whether a tensor of another precision has the values of the merged one, up to rounding."""
    if merged.is_floating_point() or merged.is_complex():
        return bool((written.isfinite() | ~merged.isfinite()).all())
    return bool((written.to(merged.dtype) == merged).all())
