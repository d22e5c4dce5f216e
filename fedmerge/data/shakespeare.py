"""Next-character prediction on Shakespeare, with the speaking roles as clients (in the manner of LEAF)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge.data.dataset import Dataset
from fedmerge.data.speeches import read_roles
from fedmerge.errors import DataError, InvalidOption
from fedmerge.registry import register

__all__ = ["VOCABULARY", "encode", "load_shakespeare"]

# Fixed, so that models trained on different roles or texts agree on what a token id means.
VOCABULARY = ("<unknown>", "\n", *(chr(code) for code in range(32, 127)))

_IDS = np.zeros(128, dtype=np.int64)
_IDS[[ord(character) for character in VOCABULARY[1:]]] = np.arange(1, len(VOCABULARY))


@register("shakespeare", kind="data set")
def load_shakespeare(
    data_dir: Path,
    sequence_length: int = 80,
    min_characters: int = 1000,
    max_clients: int | None = None,
) -> Dataset:
    """Load windows of text `[n, T]`, labelled with the same window one character on `[n, T]`.

    Each role's text is cut into windows that do not overlap; the last fifth of them is its test part.
    Roles are ordered by size, the largest first.

    Parameters
    ----------
    data_dir : Path
        Holds `shakespeare/` with `shakespeare_plays.txt`, `tinyshakespeare.txt` or `input.txt` (the first
        of them that is there), or one of these with `.gz`.
    sequence_length : int
        T, characters in a window.
    min_characters : int
        Roles with fewer characters are left out.
    max_clients : int, optional
        Keep only so many roles, the largest.

    Raises
    ------
    DataError
        Where no text is found, or it is unreadable, or no role is long enough.
    InvalidOption
        Where an option is not a positive integer.

    Examples
    --------
    >>> load_shakespeare(Path("somewhere"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fedmerge.errors.DataError: data set 'shakespeare': no text in ...
    """
    _check_positive("sequence_length", sequence_length)
    _check_positive("min_characters", min_characters)
    if max_clients is not None:
        _check_positive("max_clients", max_clients)
    texts = {name: text for name, text in read_roles(data_dir).items() if len(text) >= min_characters}
    # A window needs one character more than its length: the label of its last position.
    names = sorted(
        (name for name in texts if len(texts[name]) > sequence_length), key=lambda name: (-len(texts[name]), name)
    )[:max_clients]
    if not names:
        raise DataError(
            f"data set 'shakespeare': no role has {max(min_characters, sequence_length + 1)} characters. "
            "Lower min_characters or sequence_length."
        )
    windows = [_windows(encode(texts[name]), sequence_length) for name in names]
    counts = [(len(x), len(x) - len(x) // 5) for x, _ in windows]
    clients = np.repeat(np.arange(len(names)), [train for _, train in counts])
    pairs = list(zip(windows, counts, strict=True))
    return Dataset(
        name="shakespeare",
        train_x=_joined([x[:train] for (x, _), (_, train) in pairs]),
        train_y=_joined([y[:train] for (_, y), (_, train) in pairs]),
        test_x=_joined([x[train:] for (x, _), (_, train) in pairs]),
        test_y=_joined([y[train:] for (_, y), (_, train) in pairs]),
        num_classes=len(VOCABULARY),
        train_client=torch.from_numpy(clients),
        client_names=tuple(names),
        class_names=VOCABULARY,
    )


def encode(text: str) -> NDArray[np.int64]:
    """Token ids `[len(text)]`: positions in `VOCABULARY`, 0 for a character that it lacks.

    Examples
    --------
    >>> [VOCABULARY[token] for token in encode("To é")]
    ['T', 'o', ' ', '<unknown>']
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    ids: NDArray[np.int64] = _IDS[np.minimum(codes, 127)]  # 127 is not printable: it stands for all others
    return ids


def _windows(ids: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    end = (len(ids) - 1) // length * length
    return ids[:end].reshape(-1, length), ids[1 : end + 1].reshape(-1, length)


def _joined(parts: list[NDArray[np.int64]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))


def _check_positive(option: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidOption(f"data set 'shakespeare': {option}={value!r} must be an integer of at least 1.")
