"""Cells of a table that are no categories, although nothing else can be made of them."""

from __future__ import annotations

import gzip
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fedmerge.errors import DataError

__all__ = ["check_cells", "not_utf8"]

_WHOLE = r"\s*[+-]?\d+\s*"
_BITS = 64


def check_cells(frame: Any, names: Collection[str], where: str) -> None:
    """Refuse cells with bytes of zero, and whole numbers beyond 64 bits, which make texts of a column of numbers.

    Parameters
    ----------
    frame
        The table as pandas has read it, rows from 0 up.
    names
        Columns whose values are names, whatever they look like.
    where
        Its name, for errors.

    Raises
    ------
    DataError
        There is one; file, column and row are named, rows from 1 below the names of columns.

    Examples
    --------
    >>> import pandas
    >>> check_cells(pandas.DataFrame({"dose": [str(2**70), "5"]}), (), "table 'doses.csv'")
    Traceback (most recent call last):
        ...
    fedmerge.errors.DataError: table 'doses.csv', column 'dose', row 1: 1180591620717411303424 is beyond 64 bits...
    """
    for name, column in frame.items():
        if "\0" in name:
            raise DataError(f"{where}: the name of column {name!r} has a byte of zero (NUL): the file is damaged")
        if column.dtype.kind in "biufMm":
            continue
        texts = column[column.notna()].map(str)
        damaged = texts[texts.str.contains("\0", regex=False)]
        if len(damaged):
            raise DataError(
                f"{_place(where, name, damaged)}: the cell {damaged.iloc[0][:40]!r} has a byte of zero (NUL), which is "
                "no text: the file is damaged, or is no text in UTF-8; mend it, or leave the column out of the file"
            )
        whole = texts[texts.str.fullmatch(_WHOLE)]
        large = whole[whole.map(_is_large)]
        # A column of names may have digits in some; where all are whole numbers it is one of numbers.
        if len(large) and len(whole) == len(texts) and name not in names:
            raise DataError(
                f"{_place(where, name, large)}: {large.iloc[0].strip()[:40]} is beyond {_BITS} bits, and the column "
                "would become one of categories: write it as a fraction (1e20) or divide it; where these are names, "
                "say so by data.options.categorical"
            )


def _is_large(text: str) -> bool:
    digits = text.strip().lstrip("+-").lstrip("0")
    return len(digits) > 20 or not -(2 ** (_BITS - 1)) <= int(text) < 2**_BITS


def _place(where: str, name: str, cells: Any) -> str:
    return f"{where}, column {name!r}, row {cells.index[0] + 1}"


def not_utf8(path: Path) -> str:
    """Where a text file is no UTF-8, and what to do: the end of an error.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "towns.csv"
    >>> _ = path.write_bytes(b"town,size\\nZ\\xfcrich,4\\n")
    >>> not_utf8(path)
    ': line 2, byte 2 is 0xfc. Save it as UTF-8, such as by iconv -f latin1 -t utf-8'
    """
    place = ""
    with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                place = f": line {number}, byte {error.start + 1} is {line[error.start]:#04x}"
                break
    return f"{place}. Save it as UTF-8, such as by iconv -f latin1 -t utf-8"
