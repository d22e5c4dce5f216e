"""Damage of what clients send: arrays, packed statistics, metrics, whole replies."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import strategies as st

from fedmerge.wire.record_values import read_array
from tests.fuzz.damage import EDITS, NUMBERS, PLACES, SHAPES, TEXTS, Damage, at_place, damage, damaged, several

DTYPES = ("<f4", ">f4", "<f8", "<f2", "|O", "|S7", "<U3", "<i8", "|b1", "<c8", "<u2", "<u8", "|V0", "<M8[s]", "<f16")


def edit_data(array: Array, changes: list[Damage]) -> Array:
    """Other bytes than its dtype and shape say."""
    return Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=damaged(array.data, changes))


def say(array: Array, **said: Any) -> Array:
    """Another dtype, shape or kind of file than its bytes hold."""
    told = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data}
    return Array(**{**told, **said})


def forge_header(array: Array, header: str, length: int | None, version: bytes, size: int) -> Array:
    """A header of numpy.save that claims what it likes, and zeros behind it; `length` is the length that it tells."""
    told = struct.pack("<H", len(header) if length is None else length)
    return say(array, data=b"\x93NUMPY" + version + told + header.encode() + bytes(size))


def other_array(array: Array, shape: tuple[int, ...], dtype: str, fill: int) -> Array:
    """An honest array of another shape and dtype."""
    return Array(np.full(shape, fill, dtype))


def set_entry(array: Array, at: int, number: float) -> Array:
    """One entry that hurts; whole numbers where the array holds some."""
    values = _values(array)
    if values.size:
        kept = values.dtype.kind in "fc"
        values.flat[at % values.size] = number if kept else int(bool(number))
    return Array(values)


def fill(array: Array, number: int) -> Array:
    """One number everywhere: matrices without rank."""
    return Array(np.full_like(_values(array), number))


def _values(array: Array) -> np.ndarray:
    """The numbers of an array that is whole, or any."""
    try:
        return read_array(array).copy()
    except ValueError:
        return np.zeros(3, np.float32)


_HEADERS = st.sampled_from(("(" * 900, "{'descr': " + "-" * 800, "{}", "[]" * 100)) | st.fixed_dictionaries(
    {"descr": st.sampled_from(DTYPES), "fortran_order": st.sampled_from((True, False, 7)), "shape": SHAPES}
).map(str)

ARRAYS = (
    damage(edit_data, changes=EDITS),
    damage(
        forge_header,
        header=_HEADERS,
        length=st.sampled_from((None, None, 0, 65535)),
        version=st.sampled_from((b"\x01\x00", b"\x01\x00", b"\x03\x00")),
        size=st.integers(0, 64),
    ),
    damage(say, shape=SHAPES.map(lambda shape: tuple(n for n in shape if isinstance(n, int)))),
    damage(say, dtype=st.sampled_from((*DTYPES, "bfloat16", "float32", "object", "", "int64", "complex64"))),
    damage(say, stype=st.sampled_from(TEXTS)),
    damage(
        other_array,
        shape=st.lists(st.sampled_from((0, 1, 2, 3, 4, 6, 7)), max_size=4).map(tuple),
        dtype=st.sampled_from(("f2", "f4", "f8", "i8", "u1", "u2", "u8", "c8", "c16", "?", "i4")),
        fill=st.sampled_from((0, 1, 3)),
    ),
    damage(set_entry, at=PLACES, number=st.sampled_from((0, np.nan, np.inf, 3e38, -3e38, 1e14, -1e14, 1e-40, 1))),
    damage(fill, number=st.sampled_from((0, 1))),
)
"""Kinds of changes of one array."""


def damage_array(content: RecordDict, record: int, name: int, change: Damage) -> RecordDict:
    """Damage one array."""
    return _with_arrays(content, record, name, lambda arrays, key: {**arrays, key: change(arrays[key])})


def rename_array(content: RecordDict, record: int, name: int, new: str) -> RecordDict:
    """Give one array another name, in which ``{}`` stands for the old one."""

    def renamed(arrays: dict[str, Array], key: str) -> dict[str, Array]:
        return {n: array for n, array in arrays.items() if n != key} | {new.replace("{}", key): arrays[key]}

    return _with_arrays(content, record, name, renamed)


def pack_array(content: RecordDict, record: int, name: int, parts: Sequence[str], size: int, rank: int) -> RecordDict:
    """Parts of a statistic that says it is packed, and is far larger unpacked."""
    made = {
        "vectors": np.zeros((1, size, 0), np.int8), "peaks": np.zeros((1, 0), np.float32),
        "left": np.zeros((1, size), np.float32), "upper": np.zeros((1, size * 3), np.float32),
        "correlation": np.zeros((1, 15 if rank > 3 else 1), np.float16), "diagonal": np.ones((1, size), np.float32),
        "linear": np.zeros((size if rank > 2 else 1, 1), np.int8), "peak": np.zeros((1, size) if rank > 2 else ()),
        "root2": np.zeros((2, 3), np.float16), "ndim": np.array(rank, np.int8),
    }  # fmt: skip

    def packed(arrays: dict[str, Array], key: str) -> dict[str, Array]:
        return arrays | {f"{key.partition('#')[0]}#{part}": Array(made[part]) for part in parts}

    return _with_arrays(content, record, name, packed)


def _with_arrays(content: RecordDict, record: int, name: int, change: Callable[..., dict[str, Array]]) -> RecordDict:
    """The same records, but for one in which `change` is made at a name; that a reply without arrays gets one."""
    key = at_place(list(content.array_records) or ["arrays"], record)
    arrays = dict(content.array_records.get(key, {})) or {"w": Array(np.zeros(3, np.float32))}
    return set_record(content, key, ArrayRecord(change(arrays, at_place(list(arrays), name))))


def set_record(content: RecordDict, key: str, record: Any) -> RecordDict:
    """Put a record under a key."""
    return RecordDict({**content, key: record})


def copy_arrays(content: RecordDict, record: int, key: str) -> RecordDict:
    """Send arrays under another key as well."""
    records = list(content.array_records.values())
    return set_record(content, key, at_place(records, record) if records else ArrayRecord())


def set_metric(content: RecordDict, name: str, number: Any) -> RecordDict:
    """Give a metric another number, or a list."""
    metrics = dict(next(iter(content.metric_records.values()), {}))
    return set_record(content, "metrics", MetricRecord({**metrics, name: number}))


def say_client(content: RecordDict, key: str, client: Any) -> RecordDict:
    """Claim to be another."""
    return set_record(content, "client", ConfigRecord({key: client}))


def drop_record(content: RecordDict, record: int) -> RecordDict:
    """Leave out a record."""
    gone = at_place(list(content) or [""], record)
    return RecordDict({key: value for key, value in content.items() if key != gone})


METRICS = NUMBERS | st.sampled_from(([], [1, 2, 3], [0.5] * 3)) | NUMBERS.map(lambda number: [number])
_PARTS = ("vectors", "peaks", "left", "upper", "correlation", "diagonal", "linear", "peak", "root2", "ndim")
_USUAL = (("vectors", "peaks", "left", "ndim"), ("correlation", "diagonal", "ndim"), ("upper", "ndim"),
          ("linear", "peak"))  # fmt: skip

REPLIES = several(
    *(damage(damage_array, record=PLACES, name=PLACES, change=kind) for kind in ARRAYS),
    damage(
        rename_array, record=PLACES, name=PLACES,
        new=st.sampled_from((*TEXTS, "{}.x", "{}#upper")),
    ),
    damage(
        pack_array, record=PLACES, name=PLACES,
        parts=st.sampled_from(_USUAL) | st.lists(st.sampled_from(_PARTS), min_size=3, max_size=3, unique=True),
        size=st.sampled_from((0, 1, 3, 5, 6, 10**5)), rank=st.sampled_from((2, 3, 4, -1)),
    ),
    damage(
        set_metric, number=METRICS,
        name=st.sampled_from(("num-examples", "train_loss", "local-steps", "local_steps", "momentum", "new")),
    ),
    damage(
        say_client, key=st.sampled_from(("partition-id", "other")),
        client=st.sampled_from((0, 1, 2, -5, 2**63 - 1, True, "0", b"0", [0], 1.5)),
    ),
    damage(drop_record, record=PLACES),
    damage(
        copy_arrays, record=PLACES,
        key=st.sampled_from(("arrays", "statistics.gram", "statistics.fisher_kfac", "other")),
    ),
    damage(set_record, key=st.just("more"), record=METRICS.map(lambda number: MetricRecord({"num-examples": number}))),
)  # fmt: skip
"""Changes of a reply."""
