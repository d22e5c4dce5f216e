"""Who says what: parse plays into one text per speaking role.

Two formats are read. The marked-up plays have lines `# title`, `## act`, `@SPEAKER` (`@ONE|OTHER` where several
speak at once) and the lines of the speech. The plain one, as in tinyshakespeare, has speeches with an empty
line between them, each a line `Speaker:` and then what is said.
"""

from __future__ import annotations

import gzip
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from fedmerge.errors import DataError

__all__ = ["parse_marked_up", "parse_plain", "read_roles"]

_FILES = ("shakespeare_plays.txt", "tinyshakespeare.txt", "input.txt")


def read_roles(data_dir: Path) -> dict[str, str]:
    """Find the text below `data_dir`, and return what each role says.

    Raises
    ------
    DataError
        Where there is no text, or it cannot be read, or it holds no speeches.
    """
    path = _find(data_dir / "shakespeare")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(
            f"data set 'shakespeare': {path} cannot be read ({error}). Replace it with an intact copy."
        ) from error
    lines = text.splitlines()
    roles = parse_marked_up(lines) if text.lstrip().startswith("# ") else parse_plain(lines)
    if not roles:
        raise DataError(
            f"data set 'shakespeare': no speeches in {path}. Expected '# title' and '@SPEAKER' lines, "
            "or speeches that begin with a line 'Speaker:'."
        )
    return roles


def parse_marked_up(lines: Iterable[str]) -> dict[str, str]:
    r"""Text of each role `play: speaker`, from marked-up plays.

    Examples
    --------
    >>> parse_marked_up(["# Hamlet", "## ACT I", "@BERNARDO", "Who's there?", "", "@A|B", "Hail!"])
    {'Hamlet: BERNARDO': "Who's there?\n", 'Hamlet: A': 'Hail!\n', 'Hamlet: B': 'Hail!\n'}
    """
    said: dict[str, list[str]] = defaultdict(list)
    play, speakers = "", []
    for line in lines:
        if line.startswith("@"):
            speakers = [f"{play}: {speaker}" for speaker in line[1:].split("|")]
        elif line.startswith("# "):
            play, speakers = line[2:].strip(), []
        elif line and not line.startswith("#"):
            for speaker in speakers:
                said[speaker].append(line)
    return _texts(said)


def parse_plain(lines: Iterable[str]) -> dict[str, str]:
    r"""Text of each speaker, from speeches in the manner of tinyshakespeare.

    Examples
    --------
    >>> parse_plain(["All:", "Speak, speak.", "", "First Citizen:", "You are all", "resolved.", "", "All:", "Yes."])
    {'All': 'Speak, speak.\nYes.\n', 'First Citizen': 'You are all\nresolved.\n'}
    """
    said: dict[str, list[str]] = defaultdict(list)
    speaker, between_speeches = "", True
    for line in lines:
        if not line.strip():
            between_speeches = True
        elif between_speeches and line.endswith(":"):
            speaker, between_speeches = line[:-1], False
        elif speaker:
            said[speaker].append(line)
            between_speeches = False
    return _texts(said)


def _texts(said: dict[str, list[str]]) -> dict[str, str]:
    return {speaker: "\n".join(lines) + "\n" for speaker, lines in said.items()}


def _find(folder: Path) -> Path:
    candidates = [folder / f"{name}{ending}" for name in _FILES for ending in ("", ".gz")]
    for path in candidates:
        if path.is_file():
            return path
    raise DataError(
        f"data set 'shakespeare': no text in {folder}. Put one of {', '.join(_FILES)} (or the same with .gz) there, "
        "or point --data-dir or FEDMERGE_DATA at the folder that holds shakespeare/."
    )
