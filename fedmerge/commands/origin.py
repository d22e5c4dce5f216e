"""Where a comparison was started from: its own modules, tables and other relative paths are found there again."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["at_origin", "from_elsewhere", "make_importable", "note_origin"]

FILE = "origin.toml"


def make_importable(folder: Path) -> None:
    """Let modules in `folder` be imported, after all others."""
    if folder != Path.cwd() and str(folder) not in sys.path:
        sys.path.append(str(folder))


def note_origin(out: Path, config: Path | None) -> None:
    """Write down which folder a comparison is started from, and the folder of its configuration file."""
    folders = {"started": str(Path.cwd())}
    if config is not None:
        folders["configuration"] = str(config.parent.resolve())
    from fedmerge.records.atomic_files import write_toml

    write_toml(out / FILE, folders)


def from_elsewhere(out: Path) -> str | None:
    """The folder that a comparison was started from, where that is another than the current one."""
    started = _noted(out).get("started")
    return started if started and Path(started) != Path.cwd() and Path(started).is_dir() else None


@contextlib.contextmanager
def at_origin(out: Path) -> Iterator[None]:
    """Be in the folder that a comparison was started from, with what lay beside its configuration file importable.

    Where nothing was written down, or the folder is gone, everything stays as it is.
    """
    beside = _noted(out).get("configuration")
    with contextlib.ExitStack() as stack:
        started = from_elsewhere(out)
        if started:
            stack.enter_context(contextlib.chdir(started))
        if beside and Path(beside).is_dir():
            make_importable(Path(beside))
        yield


def _noted(out: Path) -> dict[str, Any]:
    if not (out / FILE).exists():
        return {}
    from fedmerge.records.atomic_files import read_toml

    return read_toml(out / FILE)
