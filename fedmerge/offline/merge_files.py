"""Merging models that lie in files: what ``fedmerge merge`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fedmerge.errors import BadUpdate, ConfigError, InvalidOption, ModelError, RecordError
from fedmerge.layout import check_patterns
from fedmerge.lookup.method_names import parse_value
from fedmerge.matching.widths import ALL_BUT
from fedmerge.merging import build_pipeline, main_part
from fedmerge.offline.left_out import LeftOut
from fedmerge.offline.merge import merge
from fedmerge.offline.model_files import Architecture, read_inputs
from fedmerge.offline.tensor_files import FileNames
from fedmerge.records.model_shards import INDEX_END, byte_size, write_shards
from fedmerge.records.run_records import write_tensors
from fedmerge.registry import entries
from fedmerge.routing import RoutedModel
from fedmerge.state import State, is_extra, module_state, tied_names

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
    only: Sequence[str] | None = None,
    leave_out: Sequence[str] = (),
    left_from: Literal["first", "base"] = "first",
    pattern_weights: Mapping[str, Sequence[float]] | None = None,
    rename: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    max_shard_size: int | str | None = None,
) -> Path:
    """Merge the models of several safetensors files into a new file.

    Parameters
    ----------
    files
        A ``state_dict`` each, the index of one in shards (``.index.json``), or a checkpoint of a run; widths may differ
        where the method can merge such.
    out
        Written under a temporary name and renamed; tensors have the dtypes of the first file, and the model's names.
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
    only, leave_out, left_from, pattern_weights
        As for :func:`fedmerge.merge`. Tensors that are left out may be missing in all files but the first.
    rename
        New beginnings of tensors' names by old ones, for files that name them otherwise than the model:
        ``{"model.": ""}`` drops ``model.``. It goes for all files in which names begin so, the base included.
    ignore
        Patterns of buffers that files may have or not, such as ``"*.position_ids"``: the model's own stay.
    max_shard_size
        Bytes, or a text such as ``"5GB"``: what is larger is written in several files with an index.

    Returns
    -------
    Path
        What was written: `out`, or the index of shards. Of methods that route it holds the ``state_dict`` of a routed
        model, of which :meth:`~fedmerge.routing.RoutedModel.from_state` makes a module.

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
    most = byte_size(str(max_shard_size), "--max-shard-size") if max_shard_size is not None else None
    if most is None and out.name.endswith(INDEX_END):
        raise ConfigError(f"{out} is the index of a model in shards: say how large they may be with --max-shard-size")
    chosen, model_options = _split(settings)
    _check_method(method, chosen, base)
    part = LeftOut.of(only, leave_out, left_from, with_base=base is not None)
    names = FileNames(rename or {}, check_patterns(ignore, "ignore"))
    read, known = names.read([*files, *([] if base is None else [base])])
    states = read[: len(files)]
    inputs, targets = (None, None) if data is None else read_inputs(data)
    shape = tuple(input_shape) if input_shape is not None else None
    architecture = Architecture.find(
        model, model_options, shape, classes, inputs, (files[0], states[0]), seed=seed, names=names
    )
    names.check_ignored(architecture.built, known)
    read = _with_left_out(architecture.built, read, part)
    modules = [architecture.module(file, state) for file, state in zip(files, read[: len(files)], strict=True)]
    if not part and pattern_weights is None:
        _check_widths(method, files, states)  # once it is clear that names fit, which is the worse mistake
    try:
        merged = merge(
            modules,
            method,
            weights=weights,
            base=None if base is None else architecture.module(base, read[-1]),
            data=None if inputs is None else _batches(inputs, targets),
            example=architecture.example,
            seed=seed,
            only=only,
            leave_out=leave_out,
            left_from=left_from,
            pattern_weights=pattern_weights,
            **chosen,
        )
    except BadUpdate as bad:  # people know files, not numbers of clients
        where = files[bad.client] if isinstance(bad.client, int) else bad.client
        raise ModelError(f"{where}: {bad.reason}. {bad.remedy}") from bad
    tensors = _in_types_of(states[0], merged)
    metadata = {"format": "pt", "model": model, "method": method}
    if most is not None:
        return write_shards(out, tensors, most, metadata)
    write_tensors(out, tensors, metadata)
    return out


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


def _with_left_out(built: nn.Module, states: list[dict[str, Tensor]], part: LeftOut) -> list[dict[str, Tensor]]:
    """The files' tensors, those that are left out completed by the first file's where the model has them."""
    if not part:
        return states
    own, buffers = module_state(built)
    everything = {**own, **{name: tensor for state in states for name, tensor in state.items()}}
    left = part.names(everything, buffers, tied_names(built))
    first = {name: tensor for name, tensor in states[0].items() if name in left and name in own}
    return [{**first, **{n: t for n, t in state.items() if n in own or n not in left}} for state in states]


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
    asking = [type(refinement).__name__ for refinement in pipeline.refinements]
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
                able = ", ".join(known for known, entry in entries("aggregator").items() if entry.cls.may_change_width)
                raise ModelError(
                    f"{file}: {name!r} has shape {list(tensor.shape)}, in {files[0]} {list(first.shape)}, and {method} "
                    f"merges models of equal widths. Methods for unequal hidden ones: {able}. {ALL_BUT}"
                )


def _batches(inputs: Tensor, targets: Tensor | None) -> list[Any]:
    parts = torch.split(inputs, BATCH)
    return list(parts) if targets is None else list(zip(parts, torch.split(targets, BATCH), strict=True))


def _in_types_of(like: State, merged: nn.Module) -> dict[str, Tensor]:
    """The tensors of the merged model, with the precision that they have in a file."""
    own = {n: t for n, t in merged.state_dict().items() if not is_extra(n)}
    if isinstance(merged, RoutedModel):
        like = {**like, **{f"model.{name}": tensor for name, tensor in like.items()}}
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
    return state


def _holds(written: Tensor, merged: Tensor) -> bool:
    """Whether a tensor of another precision has the values of the merged one, up to rounding."""
    if merged.is_floating_point() or merged.is_complex():
        return bool((written.isfinite() | ~merged.isfinite()).all())
    return bool((written.to(merged.dtype) == merged).all())
