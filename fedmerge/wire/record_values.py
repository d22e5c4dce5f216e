"""Values in Flower's records: named tensors of an ArrayRecord, and back; entries of a ConfigRecord.

What came over the wire is read with care: the sizes in a header are held against the bytes that are there, before any
memory is taken. Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.errors import ConfigError, InvalidOption
from fedmerge.state import State

__all__ = [
    "BFLOAT16",
    "STATISTIC",
    "from_arrays",
    "integer",
    "read_array",
    "statistics_key",
    "statistics_records",
    "strings",
    "to_arrays",
    "view_arrays",
]

BFLOAT16 = "bfloat16"
"""dtype of an Array whose bytes are the 16 bits of bfloat16, which NumPy lacks, as uint16."""

STATISTIC = "statistics."
"""How the names of records begin that hold a statistic."""
_MAGIC = b"\x93NUMPY"
# By version of the format: bytes that tell the header's length, and NumPy's parser of what follows.
_VERSIONS: dict[bytes, tuple[int, Callable[..., Any]]] = {
    b"\x01\x00": (2, np.lib.format.read_array_header_1_0),
    b"\x02\x00": (4, np.lib.format.read_array_header_2_0),
}
_LONGEST_HEADER = 1024  # one of numbers takes 128; what is kept of headers stays small
_MOST_AXES = 64  # of NumPy
_LARGEST_AXIS = 2**62

with warnings.catch_warnings():
    # torch warns once in a process of memory that must not be written; nobody writes into what a message brought.
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"\0", np.uint8))


def to_arrays(state: State) -> ArrayRecord:
    """Encode named tensors; bfloat16, which NumPy lacks, travels as its 16 bits under its own dtype name."""
    if not isinstance(state, Mapping):
        remedy = "pass model.state_dict()" if hasattr(state, "state_dict") else "pass a state_dict"
        raise InvalidOption(f"to_arrays takes named tensors, got a {type(state).__name__}: {remedy}")
    return ArrayRecord({name: _to_array(tensor) for name, tensor in state.items()})


def _to_array(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype != torch.bfloat16:
        return Array(tensor.numpy())
    bits = Array(tensor.view(torch.uint16).numpy())
    return Array(dtype=BFLOAT16, shape=bits.shape, stype=bits.stype, data=bits.data)


def from_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """Decode named tensors; every one owns its memory."""
    return {name: tensor.clone() for name, tensor in view_arrays(record).items()}


def view_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """Decode named tensors, to be read only: they lie in the record's own memory where they can."""
    return {name: _from_array(array) for name, array in record.items()}


def _from_array(array: Array) -> Tensor:
    tensor = torch.from_numpy(read_array(array)).contiguous()
    return tensor.view(torch.bfloat16) if array.dtype == BFLOAT16 else tensor


def read_array(array: Array) -> NDArray[Any]:
    """The numbers of a Flower Array, as a view of its bytes.

    ``Array.numpy()`` copies twice, and believes a header: it would take the memory that one claims.

    Raises
    ------
    ValueError
        The bytes are no NumPy array of numbers, or not of the shape and dtype that they or the Array claim.
    """
    data = array.data
    version = _VERSIONS.get(data[6:8])
    if array.stype != "numpy.ndarray" or data[:6] != _MAGIC or version is None:
        raise ValueError(f"an Array of type {array.stype!r} does not hold bytes of numpy.save")
    start = 8 + version[0] + int.from_bytes(data[8 : 8 + version[0]], "little")
    if start > _LONGEST_HEADER:
        raise ValueError(f"the header of an Array takes {start} bytes")
    shape, column_major, dtype = _header(data[6:8], data[8:start])
    wanted, present = math.prod(shape) * dtype.itemsize, len(data) - start
    if wanted != present:
        raise ValueError(f"an Array claims {dtype} of shape {list(shape)}, {wanted} bytes, and brings {present}")
    announced = "uint16" if array.dtype == BFLOAT16 else array.dtype
    if tuple(array.shape) != shape or announced != str(dtype):
        raise ValueError(
            f"an Array is announced as {array.dtype} of shape {list(array.shape)}, its bytes are {dtype} {list(shape)}"
        )
    flat = np.frombuffer(data, dtype, offset=start)
    return flat.reshape(shape, order="F" if column_major else "C")


@lru_cache(maxsize=4096)
def _header(version: bytes, header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    _, parse = _VERSIONS[version]
    try:
        shape, column_major, dtype = parse(io.BytesIO(header), max_header_size=_LONGEST_HEADER)
    except Exception as error:  # it evaluates the header as a literal, which fails in many ways
        raise ValueError(f"the header of an Array cannot be read ({type(error).__name__})") from error
    if len(shape) > _MOST_AXES or any(not 0 <= n <= _LARGEST_AXIS for n in shape):
        raise ValueError("an Array claims a shape that none can have")
    if dtype.kind not in "biufc" or not dtype.isnative:
        raise ValueError(f"an Array holds {dtype}, not numbers of this machine")
    return shape, column_major, dtype


def statistics_key(name: str) -> str:
    """The name of a statistic's record in a client's reply."""
    return f"{STATISTIC}{name}"


def statistics_records(statistics: Mapping[str, State]) -> dict[str, ArrayRecord]:
    """One extra record per statistic, for a client's reply."""
    return {statistics_key(name): to_arrays(value) for name, value in statistics.items()}


def integer(config: ConfigRecord, key: str) -> int:
    """An entry that is an integer of at least 0; 0 where it is missing.

    Raises
    ------
    ConfigError
        It is something else.
    """
    value = config.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"the message's {key!r} must be an integer of at least 0, got {value!r}")
    return value


def strings(config: ConfigRecord, key: str) -> list[str]:
    """An entry that is a list of strings; empty where it is missing.

    Raises
    ------
    ConfigError
        It is something else.
    """
    value = config.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"the message's {key!r} must be a list of strings, got {value!r}")
    return [str(item) for item in value]
