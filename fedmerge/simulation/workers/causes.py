"""What went wrong in a client, in one line of words."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

__all__ = ["in_words"]

_LONGEST = 500
_CARRIES = ("cause", "client_exc")
"""Attributes in which Ray's errors carry the one that was raised in a worker."""


def in_words(error: BaseException) -> str:
    """Type and message of an error, and of the first one that led to it, in one line.

    Examples
    --------
    >>> try:
    ...     raise RuntimeError("no data") from OSError("the disk is gone")
    ... except RuntimeError as error:
    ...     print(in_words(error))
    RuntimeError: no data (from OSError: the disk is gone)
    """
    chain = list(_chain(_carried(error)))
    told, first = _line(chain[0]), _line(chain[-1])
    if getattr(error, "actor_init_failed", False):  # quotes, among much else, the traceback of what it died of
        told = str(error).strip().splitlines()[-1].strip()
    # Many quote what led to them.
    if len(chain) > 1 and _message(chain[-1]) not in told:
        told += f" (from {first})"
    return told if len(told) <= _LONGEST else f"{told[:_LONGEST]}..."


def _carried(error: BaseException) -> BaseException:
    """The error itself, out of those of Ray's that bring it."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        inner = next((one for name in _CARRIES if isinstance(one := vars(error).get(name), BaseException)), None)
        error = error if inner is None else inner
    return error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what led to it, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _line(error: BaseException) -> str:
    name, message = type(error).__name__, _message(error)
    if message:
        return f"{name}: {message}"
    place = traceback.extract_tb(error.__traceback__)[-1:]  # a bare assertion: where it stands is all there is to tell
    return " ".join([name, *(f"in {Path(one.filename).name}, line {one.lineno}: {one.line}" for one in place)])


def _message(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())
    except Exception:
        return "its message cannot be made"
