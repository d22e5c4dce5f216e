"""The generators of many clients at once: the streams of `fedmerge.seeding`, made several times faster.

NumPy takes some 20 microseconds to make a generator: as much as all else that a small client costs when its training is
stacked. Here the hash of its seeds (after O'Neill's ``seed_seq``; NumPy promises to keep the result) runs over all
clients in arrays.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmerge.seeding import generator

__all__ = ["Streams"]

Words = NDArray[np.uint32]

_POOL = 4
_WORD, _DOUBLE = (1 << 32) - 1, (1 << 128) - 1
_PCG64_STEP = 0x2360ED051FC65DA44385DF649FCCF645


class Streams:
    """``generator(seed, purpose, client, *key)`` of each of many clients.

    Examples
    --------
    >>> streams = Streams(0, "batches", [3, 4], 1)
    >>> [g.permutation(3).tolist() for g in streams.generators([0, 1])] == [
    ...     generator(0, "batches", client, 1).permutation(3).tolist() for client in (3, 4)
    ... ]
    True
    """

    def __init__(self, seed: int, purpose: str, clients: Sequence[int], *key: int) -> None:
        self._seed, self._purpose, self._clients, self._key = seed, purpose, clients, key
        # A larger number takes more words of the seed, so such clients are no columns of one table.
        self._small = all(0 <= client <= _WORD for client in clients)
        if self._small:
            head = _words(seed)
            head += [0] * (_POOL - len(head))
            head += _words(zlib.crc32(purpose.encode()))
            ids = np.asarray(clients, dtype=np.uint32)
            tail = [word for number in key for word in _words(number)]
            self._seeds = _expand(_pool([*head, ids, *tail], len(ids)))

    def generators(self, rows: Sequence[int]) -> Iterator[np.random.Generator]:
        """The generators of some clients, by their places in the list given.

        Each is at the start of its stream, and good until the next is asked for: they share one object.
        """
        if not self._small:
            yield from (generator(self._seed, self._purpose, self._clients[row], *self._key) for row in rows)
            return
        bits = np.random.PCG64()
        shared = np.random.Generator(bits)
        for a, b, c, d in self._seeds[rows].tolist():
            increment = ((c << 64 | d) << 1 | 1) & _DOUBLE
            start = ((increment + (a << 64 | b)) * _PCG64_STEP + increment) & _DOUBLE
            bits.state = {
                "bit_generator": "PCG64",
                "state": {"state": start, "inc": increment},
                "has_uint32": 0,
                "uinteger": 0,
            }
            yield shared


def _words(number: int) -> list[int]:
    """The 32-bit words of a whole number, lowest first; 0 is one word."""
    words = [number & _WORD]
    while number := number >> 32:
        words.append(number & _WORD)
    return words


def _pool(entropy: Sequence[int | Words], count: int) -> list[Words]:
    """Mix the entropy words, each one number for all or one per client, into four words per client."""
    constant = 0x43B0D7E5

    def hashed(value: Words) -> Words:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * 0x931E8875 & _WORD
        value = value * np.uint32(constant)
        return value ^ (value >> np.uint32(16))

    def mixed(x: Words, y: Words) -> Words:
        value: Words = x * np.uint32(0xCA01F9DD) - y * np.uint32(0x4973F715)
        return value ^ (value >> np.uint32(16))

    words = [np.broadcast_to(np.asarray(word, dtype=np.uint32), (count,)) for word in entropy]
    pool = [hashed(word) for word in words[:_POOL]]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source]))
    for word in words[_POOL:]:
        for target in range(_POOL):
            pool[target] = mixed(pool[target], hashed(word))
    return pool


def _expand(pool: list[Words]) -> NDArray[np.uint64]:
    """Four 64-bit words per client, from the pool."""
    constant = 0x8B51F9DD
    halves = []
    for index in range(8):
        value = pool[index % _POOL] ^ np.uint32(constant)
        constant = constant * 0x58F38DED & _WORD
        value = value * np.uint32(constant)
        halves.append((value ^ (value >> np.uint32(16))).astype(np.uint64))
    return np.stack([low | high << np.uint64(32) for low, high in zip(halves[::2], halves[1::2], strict=True)], axis=1)
