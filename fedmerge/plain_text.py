"""Text of somebody else's (a client, a reply, a file) as a log, a terminal or a record can bear it."""

from __future__ import annotations

import logging
import unicodedata
from typing import Any

__all__ = ["LONGEST", "CleanLines", "both_ends", "cut", "cut_within", "one_line", "plain"]

LONGEST = 500
"""Characters that a client can have said in one place: a reason, a name."""
_LINE = 4000
"""Characters of a whole message, which may quote several of them."""

# Controls (escape, bell, backspace), formats (that turn the direction of writing, or are not seen), halves of
# characters, places nobody has assigned, and separators of lines and paragraphs.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"})


def plain(text: str, *, keep: str = "") -> str:
    r"""The text with every character that is not seen, or moves the cursor, written out as Python would.

    Parameters
    ----------
    text
        What somebody else said.
    keep
        Characters that stay as they are.

    Examples
    --------
    >>> plain("\x1b[2Jall is well\r\n")
    '\\x1b[2Jall is well\\r\\n'
    >>> plain("a\u202eb")
    'a\\u202eb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or unicodedata.category(c) not in _UNSEEN else _written_out(c) for c in text)


def _written_out(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def cut(text: str, longest: int = LONGEST) -> str:
    """The text, or its beginning and how much is missing.

    Examples
    --------
    >>> cut("a" * 30, 10)
    'aaaaaaaaaa... (20 more characters)'
    """
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text) - longest} more characters)"


def one_line(text: str, longest: int = LONGEST) -> str:
    r"""The text on one line: white space is a blank, what is not seen is written out, the rest is cut off.

    Examples
    --------
    >>> one_line("no disk:\n  \x1b[31mfull")
    'no disk: \\x1b[31mfull'
    """
    beginning = " ".join(text[: 2 * longest].split())  # nobody has to go through ten megabytes to show a line of them
    missing = len(text) - 2 * longest
    short = cut(plain(beginning), longest)
    return short if missing <= 0 or len(beginning) > longest else f"{short}... ({missing} more characters)"


def both_ends(text: str, longest: int = 40 * LONGEST) -> str:
    r"""A long text without its middle: a traceback says at its ends what matters.

    Examples
    --------
    >>> both_ends("abcdefghij", 4)
    'ab\n...\nij'
    """
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}\n...\n{text[-half:]}"


def cut_within(value: Any, longest: int = 4 * LONGEST) -> Any:
    """Lists and mappings of JSON with every text in them cut: what a client says fills no disk.

    Examples
    --------
    >>> cut_within({"failures": [{"client": 3, "reason": "x" * 13}]}, 8)
    {'failures': [{'client': 3, 'reason': 'xxxxxxxx... (5 more characters)'}]}
    """
    if isinstance(value, str):
        return cut(value, longest)
    if isinstance(value, dict):
        return {cut_within(key, longest): cut_within(inner, longest) for key, inner in value.items()}
    return [cut_within(inner, longest) for inner in value] if isinstance(value, list | tuple) else value


class CleanLines(logging.Filter):
    """Has every message of a logger on one line that moves no cursor, wherever it is shown."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Clean the message of a record, and let it pass."""
        message = record.getMessage()
        clean = one_line(message, _LINE)
        if clean != message:
            record.msg, record.args = clean, ()
        return True
