"""Tables in documents that come from records: what stands between two marks is written anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["markdown", "replace_between"]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, its first row the head."""
    head, *body = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body))


def replace_between(document: Path, name: str, text: str) -> None:
    """Put `text` between ``<!-- name: begin -->`` and ``<!-- name: end -->``."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    content = document.read_text()
    if begin not in content or end not in content:
        raise SystemExit(f"{document} has no marks for {name!r}")
    document.write_text(content.partition(begin)[0] + begin + text + end + content.partition(end)[2])
