"""Checkpoints: one file after each round, with a digest over every byte of it; the last few are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fedmerge.errors import InvalidOption, RecordError
from fedmerge.records.atomic_files import pack_tensors, write_atomically
from fedmerge.state import State, prefixed, with_prefix

__all__ = ["Checkpoint", "checkpoint_files", "is_checkpoint", "load_checkpoint", "newest_checkpoint", "save_checkpoint"]

log = logging.getLogger("fedmerge")

_NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})"')


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on after a round.

    Parameters
    ----------
    round
        The last round that is in it.
    sections
        Tensors by kind, such as ``state`` (the global model) and ``memory`` (of the method); their order is kept.
    facts
        All else, as JSON can hold it.
    """

    round: int
    sections: Mapping[str, State]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def section(self, name: str) -> State:
        """The tensors of one kind; none where there are none."""
        return self.sections.get(name, {})


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 3) -> Path:
    """Write a checkpoint, whole or not at all, and remove those older than the last `keep`.

    Raises
    ------
    InvalidOption
        `keep` is less than one.

    Examples
    --------
    >>> import tempfile, torch
    >>> folder = Path(tempfile.mkdtemp())
    >>> path = save_checkpoint(folder, Checkpoint(4, {"state": {"w": torch.ones(2)}}))
    >>> path.name, load_checkpoint(path).section("state")["w"].tolist()
    ('round-000004.safetensors', [1.0, 1.0])
    """
    if keep < 1:
        raise InvalidOption(f"keep_checkpoints must be at least 1, got {keep}")
    path = folder / f"round-{checkpoint.round:06d}.safetensors"
    write_atomically(path, _packed(checkpoint))
    # Newer ones than this were found damaged, and will be replaced in their turn: they do not count.
    older = [file for number, file in _numbered(folder) if number <= checkpoint.round]
    for file in older[:-keep]:
        file.unlink(missing_ok=True)
    return path


def _packed(checkpoint: Checkpoint) -> bytes:
    tensors: dict[str, Tensor] = {}
    for name, section in checkpoint.sections.items():
        tensors |= with_prefix(name, section)
    content = pack_tensors(
        tensors,
        {
            "round": str(checkpoint.round),
            # The format sorts names, and sums over a model depend on their order in the last bits.
            "order": json.dumps(list(tensors)),
            "facts": json.dumps(checkpoint.facts),
            "digest": _NO_DIGEST,
        },
    )
    start, _ = _digest_place(content)
    return content[:start] + hashlib.sha256(content).hexdigest().encode() + content[start + len(_NO_DIGEST) :]


def _digest_place(content: bytes) -> tuple[int, str]:
    """Where in a file its digest stands, and what it is; it was computed with zeros in that place."""
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    match = _DIGEST.search(header)
    if match is None:
        raise ValueError("it carries no digest")
    return 8 + match.start(1), match.group(1).decode()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises
    ------
    RecordError
        It is missing, or was truncated or edited after it was written.
    """
    try:
        content = path.read_bytes()
        start, written_digest = _digest_place(content)
        blank = content[:start] + _NO_DIGEST.encode() + content[start + len(written_digest) :]
        if hashlib.sha256(blank).hexdigest() != written_digest:
            raise ValueError("its digest does not match what is in it: it was truncated or edited")
        tensors, metadata = load(content), _metadata(content)
        order, facts = json.loads(metadata["order"]), json.loads(metadata["facts"])
        if not isinstance(facts, dict):
            raise ValueError("its facts are no object")
        names = dict.fromkeys(name.partition("/")[0] for name in order)
        ordered = {name: tensors[name] for name in order}
        sections = {name: prefixed(name, ordered) for name in names}
        return Checkpoint(int(metadata["round"]), sections, facts)
    except (OSError, SafetensorError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RecordError(f"no usable checkpoint at {path}: {error}") from error


def _metadata(content: bytes) -> dict[str, str]:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata: dict[str, str] = header["__metadata__"]
    return metadata


def is_checkpoint(path: Path) -> bool:
    """Whether a safetensors file says that it is a checkpoint, whole or not.

    Raises
    ------
    OSError, ValueError
        It cannot be read, or is no safetensors file.
    """
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {"round", "order", "facts", "digest"} <= set(header.get("__metadata__", {}))


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, whole or not."""
    return [file for _, file in _numbered(folder)]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    numbered = []
    for file in folder.glob("round-*.safetensors"):
        number = file.stem.removeprefix("round-")
        if number.isdecimal():
            numbered.append((int(number), file))
    return sorted(numbered)


def newest_checkpoint(
    folder: Path, check: Callable[[Checkpoint], str | None] = lambda checkpoint: None
) -> Checkpoint | None:
    """The newest checkpoint that is whole; each one that is not is named in a warning.

    Parameters
    ----------
    folder
        Where checkpoints lie.
    check
        Says what else is wrong with one, if anything is.

    Returns
    -------
    Checkpoint or None
        None where none was ever written.

    Raises
    ------
    RecordError
        There are some, and none can be used.
    """
    files = checkpoint_files(folder)
    for path in reversed(files):
        try:
            checkpoint = load_checkpoint(path)
            fault = check(checkpoint)
        except RecordError as error:
            log.warning("%s; looking for the one before", error)
            continue
        if fault is None:
            return checkpoint
        log.warning("checkpoint %s cannot be used: %s; looking for the one before", path, fault)
    if files:
        raise RecordError(
            f"none of the {len(files)} checkpoints in {folder} can be used (see the warnings): "
            "restore one from a backup, or delete the folder and start again from the first round"
        )
    return None
