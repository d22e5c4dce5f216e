"""A folder that one process writes to: the system's lock on a file in which the holder says who it is.

The system frees such a lock with the process, however that ends, so none has to be broken after a kill. What the file
says serves people, and folders on a shared disk: a file system may keep its locks within one machine, so what a
process of another machine left there is believed.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from fedmerge.errors import FolderInUse
from fedmerge.plain_text import one_line
from fedmerge.records.atomic_files import writing
from fedmerge.records.processes import machine, start_of

__all__ = ["LOCK", "Holder", "held"]

LOCK = "in-use.lock"
"""Name of the lock in a folder that serves one command at a time."""

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
_LONGEST = 16_384  # bytes of a lock that are read


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: what its file says."""

    pid: int
    host: str
    machine: str
    """Of the running system, where it tells: hosts may share a name, and containers of one machine have several."""
    started: str
    """When the process began, as the system counts it: a number that another process has by now does not deceive."""
    since: str
    command: str

    @classmethod
    def here(cls) -> Self:
        """This process."""
        command = one_line(shlex.join(sys.argv))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(os.getpid(), socket.gethostname(), machine(), start_of(os.getpid()) or "", now, command)

    @classmethod
    def of(cls, text: bytes) -> Self | None:
        """Whom the text of a lock names, if it names anybody."""
        try:
            facts = json.loads(text)
            texts = (one_line(str(facts[name])) for name in ("host", "machine", "started", "since", "command"))
            return cls(int(facts["pid"]) % 2**31, *texts)
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
            return None

    @property
    def elsewhere(self) -> bool:
        """Whether it is a process of another machine, of which nothing is known here."""
        here = machine()
        if self.machine and here:
            # A machine that was started anew keeps its name, and none of its processes.
            return self.machine != here and self.host != socket.gethostname()
        return self.host != socket.gethostname()

    @property
    def alive(self) -> bool:
        """Whether the process still runs on this machine: the same one, not another with its number."""
        began = start_of(self.pid)
        return began is not None and self.machine == machine() and (not self.started or began in ("", self.started))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command}, since {self.since})"


@contextmanager
def held(path: Path, what: str | Path) -> Iterator[None]:
    """Hold the lock at `path` within the block; no other process, and no other thread, can.

    Parameters
    ----------
    path
        File of the lock. It is gone after the block, and a folder that was made for it too if it is empty.
    what
        What it is a lock on, as an error names it.

    Raises
    ------
    FolderInUse
        Somebody else holds it.
    WriteError
        It cannot be made.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with held(folder / LOCK, folder):
    ...     (folder / LOCK).exists()
    True
    >>> (folder / LOCK).exists()
    False
    """
    with writing(path):
        made = _make_folders(path.parent)
        file = _open(path, what)
    try:
        yield
    finally:
        try:
            with suppress(OSError):  # it may have been taken away, the folder with it
                path.unlink()  # before it is let go: afterwards it may be another's
        finally:
            os.close(file)
        for folder in made:
            with suppress(OSError):  # there is something in it
                folder.rmdir()


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder, and say which ones were made, the innermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _open(path: Path, what: str | Path) -> int:
    """A locked file at `path` that names this process."""
    while True:
        file = os.open(path, _FLAGS, 0o644)
        try:
            locked = _lock(file)
            holder = Holder.of(os.read(file, _LONGEST))
            if locked is False or (locked is None and holder is not None and holder.alive):
                raise FolderInUse(what, path, holder)
            if holder is not None and holder.elsewhere:
                raise FolderInUse(what, path, holder, elsewhere=True)
            if not _is_at(file, path):  # whoever held it has let go of it, and taken the file away
                os.close(file)
                continue
            os.truncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
            os.write(file, json.dumps(asdict(Holder.here()), indent=1).encode())
            return file
        except BaseException:
            with suppress(OSError):
                os.close(file)
            raise


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: int) -> bool | None:
    """Whether the file could be locked; None where its file system, or this one, has no locks."""
    try:
        import fcntl  # noqa: PLC0415 - not on every system
    except ImportError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True
