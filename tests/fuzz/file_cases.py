"""Streams of damaged files and settings, each case with a name."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from fedmerge.data import PartitionSettings, load_dataset
from fedmerge.data.partition import Partition, make_partition
from fedmerge.models import build_model
from fedmerge.offline.merge_files import merge_files
from fedmerge.offline.model_files import read_inputs
from fedmerge.plotting.runs import read_runs
from fedmerge.records.atomic_files import read_toml
from fedmerge.records.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from fedmerge.records.model_tensors import read_state
from fedmerge.records.run_records import RunRecord
from fedmerge.simulation.runs.config import make_config, parse_assignment
from fedmerge.simulation.runs.snapshot import restore
from tests.answered import asked
from tests.fuzz import mutate
from tests.fuzz.cases import Case
from tests.hostile.state_kinds import STATES


def files(seed: int, number: int, folder: Path) -> Iterator[Case]:
    """Files of tensors: damaged bytes, headers that tell other sizes than there are, tensors that no client sends."""
    rng = random.Random(seed)
    model = build_model("mlp", (1, 8, 8), 10, seed=0)
    whole = {"model": save(model.state_dict()), "inputs": save({"inputs": torch.zeros(3, 1, 8, 8)})}
    good, path = folder / "good.safetensors", folder / "damaged.safetensors"
    good.write_bytes(whole["model"])
    for i in range(number):
        kind = rng.choice(("model", "model", "model", "inputs", "inputs", "merge", "merge", "hostile"))
        content = whole["inputs" if kind == "inputs" else "model"]
        damaged = mutate.flipped(rng, content) if rng.random() < 0.4 else _retold(rng, content)
        if kind == "hostile":
            damaged = _hostile(rng, model.state_dict())

        def case(kind=kind, damaged=damaged):
            path.write_bytes(damaged)
            if kind == "inputs":
                read_inputs(path)
            elif kind == "model" or (kind == "merge" and rng.random() < 0.7):
                read_state(path)
            else:
                merge_files([good, path], folder / "out.safetensors", model="mlp", input_shape=(1, 8, 8))

        yield f"file {seed}/{i} {kind}", case


def _hostile(rng: random.Random, state: dict[str, torch.Tensor]) -> bytes:
    """A whole file with the model of a hostile client."""
    found = rng.choice(list(STATES.values()))(rng, state, state)
    return save({name: tensor.contiguous() for name, tensor in (found or state).items()})


def _retold(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file whose header tells something else."""
    size = struct.unpack("<Q", content[:8])[0]
    told = json.loads(content[8 : 8 + size])
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(list(told))
        entry = told[name] = dict(told[name])
        kind = rng.randrange(6)
        if kind == 0:
            entry["shape"] = [n for n in mutate.shape(rng) if not isinstance(n, bool)]
        elif kind == 1:
            entry["dtype"] = rng.choice(("F64", "BF16", "I8", "F8_E4M3", "F4", "U64", "C64", "object", "", None))
        elif kind == 2:
            entry["data_offsets"] = [rng.choice(mutate.HUGE), rng.choice(mutate.HUGE)]
        elif kind == 3:
            told[rng.choice(mutate.TEXTS)] = entry
        elif kind == 4:
            told["__metadata__"] = mutate.value(rng)
        else:
            told[name] = mutate.value(rng)
        told = {key: value for key, value in told.items() if isinstance(value, dict)} or {"x": {}}
    header = _dumped(told)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def _dumped(value: object) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def checkpoints(seed: int, number: int, folder: Path) -> Iterator[Case]:
    """Checkpoints that are damaged, or forged with a digest that fits, and what a run makes of them."""
    rng = random.Random(seed)
    run = RunRecord(folder / "run", {"rounds": 3})
    run.append({"round": 0})
    state = {"w": torch.ones(3), "b": torch.zeros(())}
    run.checkpoint(1, state, {"m": torch.ones(2)}, facts={"random": [1], "strategy": {"dict": []}})
    path = next((folder / "run.partial" / "checkpoint").iterdir())
    whole = path.read_bytes()
    strategy = asked("fedavg").strategy
    for i in range(number):
        forged = rng.random() < 0.7
        if forged:
            facts = {"config": {"rounds": 3}, "position": 13, "random": mutate.value(rng), "strategy": {"dict": []}}
            facts = mutate.settings(rng, facts, ["config", "position", "clients", "engine"])
            damaged = _forged(rng, path, facts, state)
        else:
            damaged = mutate.flipped(rng, whole)

        def case(damaged=damaged):
            path.write_bytes(damaged)
            restore(load_checkpoint(path), strategy, None)

        def reopened(damaged=damaged):
            path.write_bytes(damaged)
            (folder / "run.partial" / "rounds.jsonl").write_bytes(b'{"round": 0}\n')
            RunRecord.reopen(folder / "run", {"rounds": 3})

        yield f"checkpoint {seed}/{i}", rng.choice((case, reopened))


def _forged(rng: random.Random, path: Path, facts: dict, state: dict) -> bytes:
    try:
        json.dumps(facts)
    except ValueError:
        facts = {}
    save_checkpoint(path.parent, Checkpoint(1, {"state": state}, facts))
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    told = json.loads(content[8 : 8 + size])
    if rng.random() < 0.5:
        key = rng.choice(("round", "order", "facts"))
        told["__metadata__"][key] = rng.choice(("[" * 100_000, "null", "[1]", '["x/y"]', '{"a": 1}', "", "9" * 5000))
    told["__metadata__"]["digest"] = "0" * 64
    header = json.dumps(told, separators=(",", ":")).encode()
    blank = struct.pack("<Q", len(header)) + header + content[8 + size :]
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)


def rows(seed: int, number: int, folder: Path) -> Iterator[Case]:
    """rounds.jsonl of a run."""
    rng = random.Random(seed)
    row = {"method": "fedavg", "seed": 0, "round": 0, "clients_ok": 3, "clients_failed": 0, "bytes_down": 5,
           "bytes_up": 5, "parameters": 9, "seconds_train": 0.1, "seconds_merge": 0.1, "seconds_evaluate": 0.1,
           "test_loss": 1.0, "test_accuracy": 0.5, "train_loss": None}  # fmt: skip
    path = folder / "drawn" / "rounds.jsonl"
    path.parent.mkdir(exist_ok=True)
    for i in range(number):
        lines = [_dumped({**row, "round": 0}), _dumped(mutate.settings(rng, {**row, "round": 1}, ["round"]))]
        content = b"\n".join(lines) + rng.choice((b"\n", b"", b"[" * 5000))
        content = mutate.flipped(rng, content) if rng.random() < 0.5 else content

        def case(content=content):
            path.write_bytes(content)
            read_runs([path.parent])

        yield f"rows {seed}/{i}", case


def configs(seed: int, number: int, folder: Path) -> Iterator[Case]:
    """Configurations: settings as TOML gives them, texts, and assignments of the command line."""
    rng = random.Random(seed)
    known = make_config({}).model_dump(mode="json")
    text = b'methods = ["fedavg"]\nrounds = 3\n[partition]\nscheme = "iid"\nclients = 4\n[training]\nepochs = 1\n'
    path = folder / "config.toml"
    for i in range(number):
        damaged = mutate.settings(rng, known, ["attack", "statistics", "target"])
        content = mutate.flipped(rng, text) + rng.choice(
            (b"", b"x = " + b"[" * 3000, b"x = " + b"9" * 5000, b"x=0x" + b"f" * 5000)
        )
        written = (
            f"{rng.choice(('rounds', 'partition.alpha', 'a.b', '', 'data'))}={rng.choice((*mutate.TEXTS, '[' * 3000))}"
        )

        def case(damaged=damaged):
            make_config(damaged)

        def read(content=content):
            path.write_bytes(content)
            make_config(read_toml(path))

        def assigned(written=written):
            make_config(parse_assignment(written))

        yield f"config {seed}/{i}", rng.choice((case, case, read, assigned))


def partitions(seed: int, number: int) -> Iterator[Case]:
    """Partition files, and a data set that is read by what came out."""
    rng = random.Random(seed)
    dataset = load_dataset("digits")
    tensors = make_partition(dataset, PartitionSettings("iid", clients=4), 0).to_tensors()
    about = json.loads(bytes(tensors["about"].tolist()))
    for i in range(number):
        damaged = dict(tensors)
        for _ in range(rng.randint(1, 2)):
            name = rng.choice(list(damaged) or ["about"])
            kind = rng.randrange(5)
            if kind == 0:
                damaged.pop(name, None)
            elif kind == 1 and name in damaged and damaged[name].numel():
                damaged[name] = damaged[name].clone()
                damaged[name].view(-1)[rng.randrange(damaged[name].numel())] = rng.choice((0, 1, 100, 255))
                if damaged[name].dtype == torch.int64:
                    damaged[name].view(-1)[rng.randrange(damaged[name].numel())] = rng.choice((-1, 10**6, 2**62))
            elif kind == 2:
                sizes = tuple(rng.choice((0, 1, 4, 5)) for _ in range(rng.randint(0, 3)))
                dtype = rng.choice((torch.int64, torch.float32, torch.uint8, torch.bool))
                damaged[name] = torch.zeros(sizes, dtype=dtype)
            elif kind == 3:
                content = _dumped(mutate.settings(rng, about, ["settings"]))
                damaged["about"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            else:
                content = mutate.flipped(rng, _dumped(about)) or b"[" * 3000
                damaged["about"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)

        def case(damaged=damaged):
            partition = Partition.from_tensors(damaged)
            for client in range(min(3, len(partition.train))):
                partition.client_data(dataset, client)

        yield f"partition {seed}/{i}", case


def datasets(seed: int, number: int, folder: Path) -> Iterator[Case]:
    """Files of MNIST, of Heart Disease and of Shakespeare."""
    rng = random.Random(seed)
    raw, hearts, plays = folder / "MNIST/raw", folder / "heart-disease", folder / "shakespeare"
    for place in (raw, hearts, plays):
        place.mkdir(parents=True, exist_ok=True)
    images = struct.pack(">IIII", 2051, 6, 28, 28) + bytes(6 * 784)
    labels = struct.pack(">II", 2049, 6) + bytes(range(6))
    idx = {f"{part}-{kind}-ubyte": content for part in ("train", "t10k")
           for kind, content in (("images-idx3", images), ("labels-idx1", labels))}  # fmt: skip
    rng_rows = np.random.default_rng(0)
    table = io.BytesIO()
    np.savetxt(table, rng_rows.integers(0, 2, (12, 14)), delimiter=",", fmt="%d")
    tables = {f"processed.{name}.data": table.getvalue() for name in ("cleveland", "hungarian", "switzerland", "va")}
    texts = {"tinyshakespeare.txt": b"All:\nSpeak, speak.\n\nFirst:\nYou are all resolved rather to die.\n" * 20}
    kinds = (("mnist", raw, idx), ("heart_disease", hearts, tables), ("shakespeare", plays, texts))
    for i in range(number):
        name, place, whole = kinds[i % 3]
        victim = rng.choice(list(whole))
        damaged = {**whole, victim: mutate.flipped(rng, whole[victim])}

        def case(name=name, place=place, damaged=damaged):
            for file, content in damaged.items():
                (place / file).write_bytes(content)
            load_dataset(name, folder)

        yield f"data {seed}/{i} {name}", case
