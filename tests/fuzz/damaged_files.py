"""Damage of files: headers of tensor files, digests of checkpoints, tensors of partitions."""

from __future__ import annotations

import hashlib
import json
import struct
from contextlib import suppress
from typing import Any

import torch
from hypothesis import strategies as st

from tests.fuzz.damage import EDITS, HUGE, PLACES, SHAPES, TEXTS, VALUES, Damage, at_place, damage, damaged, several


def dumped(value: object) -> bytes:
    """As JSON, surrogates included."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def edit_bytes(content: bytes, changes: list[Damage]) -> bytes:
    """Other bytes anywhere."""
    return damaged(content, changes)


def edit_header(content: bytes, changes: list[Damage]) -> bytes:
    """A safetensors file whose header tells something else; all but mappings is left out of it."""
    header, rest = split(content)
    header = {key: value for key, value in damaged(header, changes).items() if isinstance(value, dict)} or {"x": {}}
    return joined(dumped(header), rest)


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the tensors behind it."""
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: bytes, rest: bytes) -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(header)) + header + rest


def set_field(header: dict[str, Any], entry: int, field: str, value: Any) -> dict[str, Any]:
    """Have the header tell something else of one tensor."""
    name = at_place(list(header), entry)
    return {**header, name: {**header[name], field: value} if isinstance(header[name], dict) else value}


def set_entry(header: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Put an entry into the header."""
    return {**header, name: value}


def replace_entry(header: dict[str, Any], entry: int, value: Any) -> dict[str, Any]:
    """Put anything in the place of an entry."""
    return {**header, at_place(list(header), entry): value}


def copy_entry(header: dict[str, Any], entry: int, name: str) -> dict[str, Any]:
    """Have two entries tell of the same bytes."""
    return {**header, name: header[at_place(list(header), entry)]}


HEADERS = several(
    damage(
        set_field, entry=PLACES, field=st.just("shape"),
        value=SHAPES.map(lambda shape: [n for n in shape if not isinstance(n, bool)]),
    ),
    damage(
        set_field, entry=PLACES, field=st.just("dtype"),
        value=st.sampled_from(("F64", "BF16", "I8", "F8_E4M3", "F4", "U64", "C64", "object", "", None)),
    ),
    damage(
        set_field, entry=PLACES, field=st.just("data_offsets"),
        value=st.lists(st.sampled_from(HUGE), min_size=2, max_size=2),
    ),
    damage(copy_entry, entry=PLACES, name=st.sampled_from(TEXTS)),
    damage(set_entry, name=st.just("__metadata__"), value=VALUES),
    damage(replace_entry, entry=PLACES, value=VALUES),
    most=2,
)  # fmt: skip
FILES = damage(edit_bytes, changes=EDITS) | damage(edit_header, changes=HEADERS)
"""Changes of a safetensors file."""


def forge_digest(content: bytes, key: str | None, value: str) -> bytes:
    """A checkpoint that says `value` under a key of its metadata, with a digest that fits."""
    header, rest = split(content)
    if key is not None:
        header["__metadata__"][key] = value
    header["__metadata__"]["digest"] = "0" * 64
    blank = joined(json.dumps(header, separators=(",", ":")).encode(), rest)
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)


_FORGED = ("null", "[1]", '["x/y"]', '{"a": 1}', "", "[" * 100_000, "9" * 5000)
FORGERIES = damage(
    forge_digest,
    key=st.sampled_from((None, "round", "order", "facts")),
    value=st.integers(0, len(_FORGED) - 1).map(_FORGED.__getitem__),  # Hypothesis would print them all
)

Tensors = dict[str, torch.Tensor]


def drop_tensor(tensors: Tensors, name: int) -> Tensors:
    """Leave one out."""
    gone = at_place(list(tensors) or [""], name)
    return {key: tensor for key, tensor in tensors.items() if key != gone}


def set_number(tensors: Tensors, name: int, at: int, number: int) -> Tensors:
    """Another number in one place, or as much of it as one byte holds."""
    key = at_place(list(tensors) or [""], name)
    if key not in tensors or not tensors[key].numel():
        return tensors
    changed = tensors[key].clone()
    changed.view(-1)[at % changed.numel()] = number if changed.dtype == torch.int64 else number % 256
    return {**tensors, key: changed}


def set_tensor(tensors: Tensors, name: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensors:
    """Zeros of another shape and dtype."""
    return {**tensors, at_place(list(tensors) or ["about"], name): torch.zeros(shape, dtype=dtype)}


def edit_facts(tensors: Tensors, changes: list[Damage]) -> Tensors:
    """Other facts about the partition."""
    with suppress(LookupError, ValueError):  # they are gone, or no facts any more
        facts = json.loads(_about(tensors))
        return _with_about(tensors, dumped(damaged(facts, changes))) if isinstance(facts, dict) else tensors
    return tensors


def edit_about(tensors: Tensors, changes: list[Damage]) -> Tensors:
    """Other bytes where the facts are written; what is left empty becomes a list without an end."""
    return _with_about(tensors, damaged(_about(tensors) if "about" in tensors else b"", changes) or b"[" * 3000)


def _about(tensors: Tensors) -> bytes:
    return bytes(tensors["about"].flatten().to(torch.uint8).tolist())


def _with_about(tensors: Tensors, content: bytes) -> Tensors:
    return {**tensors, "about": torch.frombuffer(bytearray(content), dtype=torch.uint8)}


def partitions(facts: st.SearchStrategy[list[Damage]]) -> st.SearchStrategy[list[Damage]]:
    """Changes of a partition's tensors, whose facts change so."""
    return several(
        damage(drop_tensor, name=PLACES),
        damage(
            set_number, name=PLACES, at=st.integers(0, 2**12),
            number=st.sampled_from((0, 1, 100, 255, -1, 10**6, 2**62)),
        ),
        damage(
            set_tensor, name=PLACES, shape=st.lists(st.sampled_from((0, 1, 4, 5)), max_size=3).map(tuple),
            dtype=st.sampled_from((torch.int64, torch.float32, torch.uint8, torch.bool)),
        ),
        damage(edit_facts, changes=facts),
        damage(edit_about, changes=EDITS),
        most=2,
    )  # fmt: skip
