"""Damage that knows the structure of what it damages: arrays, records, nested settings, bytes."""

from __future__ import annotations

import random
import struct

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedmerge.wire.record_values import read_array

HUGE = (0, 1, -1, 2**31, 2**62, 10**12, 10**18)
NUMBERS = (0, -1, 1, 2**63 - 1, -(2**63), 10**30, 1e308, 5e-324, float("nan"), float("inf"), -float("inf"), -0.0, 1e15)
DTYPES = ("<f4", ">f4", "<f8", "<f2", "|O", "|S7", "<U3", "<i8", "|b1", "<c8", "<u2", "<u8", "|V0", "<M8[s]", "<f16")
TEXTS = ("", "x", "../../etc/passwd", "\0", "é" * 50, "__import__('os')", "-1", "1e999", "a.b.c#vectors", "(" * 200)


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Bytes with some of them changed, left out, doubled or replaced by a huge number."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not damaged:
            return bytes(rng.randrange(256) for _ in range(rng.randint(0, 20)))
        at = rng.randrange(len(damaged))
        kind = rng.randrange(6)
        if kind == 0:
            damaged[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del damaged[at:]
        elif kind == 2:
            damaged[at : at + rng.randint(1, 16)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 16)))
        elif kind == 3:
            damaged[at:at] = damaged[at : at + 32]
        elif kind == 4:
            damaged[at : at + 8] = struct.pack("<q", rng.choice((2**31, 2**62, -1, 10**12)))
        else:
            del damaged[at : at + rng.randint(1, 8)]
    return bytes(damaged)


def shape(rng: random.Random) -> tuple:
    """A shape that may be of anything."""
    return tuple(rng.choice((*HUGE, 2, 3, 4, 6, 10**40, 1.5, True)) for _ in range(rng.randint(0, 5)))


def header(rng: random.Random) -> bytes:
    """A header of numpy.save that claims what it likes."""
    told = {"descr": rng.choice(DTYPES), "fortran_order": rng.choice((True, False, 7)), "shape": shape(rng)}
    text = str(told) if rng.random() < 0.8 else rng.choice(("(" * 900, "{'descr': " + "-" * 800, "{}", "[]" * 100))
    length = rng.choice((len(text), len(text), 0, 65535))
    return (
        b"\x93NUMPY" + rng.choice((b"\x01\x00", b"\x01\x00", b"\x03\x00")) + struct.pack("<H", length) + text.encode()
    )


def array(rng: random.Random, one: Array) -> Array:
    """A damaged array."""
    told = {"dtype": one.dtype, "shape": one.shape, "stype": one.stype, "data": one.data}
    kind = rng.randrange(8)
    if kind == 0:
        told["data"] = flipped(rng, one.data)
    elif kind == 1:
        told["data"] = header(rng) + bytes(rng.randint(0, 64))
    elif kind == 2:
        told["shape"] = tuple(n for n in shape(rng) if isinstance(n, int))
    elif kind == 3:
        told["dtype"] = rng.choice((*DTYPES, "bfloat16", "float32", "object", "", "int64", "complex64"))
    elif kind == 4:
        told["stype"] = rng.choice(TEXTS)
    elif kind == 5:  # honest, but of another shape, dtype or size
        sizes = tuple(rng.choice((0, 1, 2, 3, 4, 6, 7)) for _ in range(rng.randint(0, 4)))
        dtype = rng.choice(("f2", "f4", "f8", "i8", "u1", "u2", "u8", "c8", "c16", "?", "i4"))
        return Array(np.full(sizes, rng.choice((0, 1, 3)), dtype))
    elif kind == 6:  # honest, with numbers that hurt
        values = _values(one)
        if values.dtype.kind in "fc" and values.size:
            values.flat[rng.randrange(values.size)] = rng.choice((np.nan, np.inf, 3e38, -3e38, 1e14, -1e14, 1e-40, 0))
        elif values.size:
            values.flat[rng.randrange(values.size)] = rng.choice((0, 1, 2**7 - 1))
        return Array(values)
    else:  # of zeros, or of one value: matrices without rank
        return Array(np.full_like(_values(one), rng.choice((0, 1))))
    return Array(**told)


def _values(one: Array) -> np.ndarray:
    """The numbers of an array that is whole, or any."""
    try:
        return read_array(one).copy()
    except ValueError:
        return np.zeros(3, np.float32)


def number(rng: random.Random):
    """A metric: a number, or a list of them."""
    one = rng.choice(NUMBERS)
    return rng.choice((one, one, [one], [], [1, 2, 3], [0.5] * 3))


PARTS = ("vectors", "peaks", "left", "upper", "correlation", "diagonal", "linear", "peak", "root2", "ndim")


def packed(rng: random.Random, names) -> dict[str, Array]:
    """A statistic that says it is packed, and is far larger unpacked."""
    name = rng.choice([*names, "x", "0.weight.A", "0.weight"]).partition("#")[0]
    size = rng.choice((0, 1, 3, 5, 6, 10**5))
    made = {
        "vectors": np.zeros((1, size, 0), np.int8), "peaks": np.zeros((1, 0), np.float32),
        "left": np.zeros((1, size), np.float32), "upper": np.zeros((1, size * 3), np.float32),
        "correlation": np.zeros((1, rng.choice((0, 1, 15))), np.float16), "diagonal": np.ones((1, size), np.float32),
        "linear": np.zeros((rng.choice((1, size)), 1), np.int8), "peak": np.zeros(rng.choice(((), (1, size)))),
        "root2": np.zeros((2, 3), np.float16), "ndim": np.array(rng.choice((2, 3, 4, -1)), np.int8),
    }  # fmt: skip
    usual = rng.choice((("vectors", "peaks", "left", "ndim"), ("correlation", "diagonal", "ndim"), ("upper", "ndim"),
                        ("linear", "peak"), tuple(rng.sample(PARTS, 3))))  # fmt: skip
    return {f"{name}#{part}": Array(made[part]) for part in usual}


def reply(rng: random.Random, content: RecordDict) -> RecordDict:
    """A damaged reply."""
    content = RecordDict(dict(content.items()))  # records are replaced, not changed
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(12)
        keys = list(content.array_records)
        key = rng.choice(keys) if keys else "arrays"
        arrays = dict(content.array_records.get(key, {}))
        names = list(arrays)
        if kind <= 4 and names:
            name = rng.choice(names)
            arrays[name] = array(rng, arrays[name])
        elif kind == 5 and names:
            name = rng.choice(names)
            arrays[rng.choice((*TEXTS, name + ".x", f"{name}#upper"))] = arrays.pop(name)
        elif kind == 6:
            arrays |= packed(rng, names or ["w"])
        elif kind == 7:
            metrics = dict(next(iter(content.metric_records.values()), {}))
            metrics[rng.choice(("num-examples", "train_loss", "local-steps", "local_steps", "momentum", "new"))] = (
                number(rng)
            )
            content["metrics"] = MetricRecord(metrics)
            continue
        elif kind == 8:
            told = rng.choice((0, 1, 2, -5, 2**63 - 1, True, "0", b"0", [0], 1.5))
            content["client"] = ConfigRecord({rng.choice(("partition-id", "other")): told})
            continue
        elif kind == 9:
            content.pop(rng.choice(list(content)), None)
            if not content:
                return content
            continue
        elif kind == 10:
            content[rng.choice(("arrays", "statistics.gram", "statistics.fisher_kfac", "other"))] = ArrayRecord(arrays)
            continue
        else:
            content["more"] = MetricRecord({"num-examples": number(rng)})
            continue
        content[key] = ArrayRecord(arrays)
    return content


def settings(rng: random.Random, config: dict, keys: list[str]) -> dict:
    """Nested settings with some of them changed."""
    damaged = dict(config)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*keys, *damaged, rng.choice(TEXTS)])
        if isinstance(damaged.get(key), dict) and rng.random() < 0.8:
            damaged[key] = settings(rng, damaged[key], list(damaged[key]))
        else:
            damaged[key] = value(rng)
    return damaged


def value(rng: random.Random, depth: int = 0):  # noqa: PLR0911
    """Anything that TOML or JSON can hold."""
    kind = rng.randrange(9 if depth < 3 else 7)
    if kind <= 1:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice(TEXTS)
    if kind == 3:
        return rng.choice((True, False))
    if kind == 4:
        return rng.randint(-3, 30)
    if kind == 5:
        return rng.random() * 3 - 1
    if kind == 6:
        return rng.choice(
            ("fedavg", "fednova(", "median+server_adam", "iid", "dirichlet", "mlp", "sgd", "auto", "krum")
        )
    if kind == 7:
        return [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return {rng.choice((*TEXTS, "name", "kind", "options")): value(rng, depth + 1) for _ in range(rng.randint(0, 3))}
