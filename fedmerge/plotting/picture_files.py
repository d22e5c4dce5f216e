"""Writing a file so that a reader sees the old one or the whole new one, never a half."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedmerge.errors import RecordError

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` if the block ends well.

    Raises
    ------
    RecordError
        The folder cannot be made or written to.

    Examples
    --------
    >>> with replacing(Path("summary.csv")) as temporary:  # doctest: +SKIP
    ...     temporary.write_text("method\\n")
    """
    # The suffix stays, because matplotlib takes the file format from it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RecordError(f"{path} cannot be written: {error}. Choose another place.") from error
