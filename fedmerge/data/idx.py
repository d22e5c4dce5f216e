"""Read a file in the format of MNIST: a magic number, sizes, bytes."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_idx"]

_UNSIGNED_BYTES = 8


def read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """The array of unsigned bytes in a file of Yann LeCun's IDX format.

    Parameters
    ----------
    path : Path
        The file, not compressed.
    axes : int
        How many axes it must have: 3 for images `[n, height, width]`, 1 for labels `[n]`.

    Raises
    ------
    ValueError
        Where the header is another one, or the file is longer or shorter than its header says.
    OSError
        Where it cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "labels")
    ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    ...     read_idx(path, axes=1)
    array([7, 9], dtype=uint8)
    """
    raw = path.read_bytes()
    header = np.frombuffer(raw, dtype=">u4", count=1 + axes) if len(raw) >= 4 * (1 + axes) else np.zeros(1)
    if header[0] != _UNSIGNED_BYTES << 8 | axes:
        raise ValueError(f"{path.name} does not begin as an IDX file of bytes along {axes} axes does")
    sizes, body = [int(size) for size in header[1:]], len(raw) - header.nbytes
    # Before anything is made of the sizes: a file can claim what it likes.
    if prod(sizes) != body:
        raise ValueError(f"{path.name} says it holds {' x '.join(map(str, sizes))} bytes, and {body} follow")
    return np.frombuffer(bytearray(raw), dtype=np.uint8, offset=header.nbytes).reshape(sizes)
