"""What a run left, but for how long it took: equal for runs that are equal to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fedmerge.records.checkpoints import newest_checkpoint


def outcome(folder: Path):
    """Rows without seconds, tensors and facts of the last checkpoint, the partition."""
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]
    last = newest_checkpoint(folder / "checkpoint")
    tensors = {kind: [(name, *bits(t)) for name, t in section.items()] for kind, section in last.sections.items()}
    facts = {name: value for name, value in last.facts.items() if name != "position"}  # bytes, of seconds too
    return rows, tensors, facts, last.round, (folder / "partition.safetensors").read_bytes()


def bits(tensor: torch.Tensor):
    """Type, shape and bytes."""
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).tolist()


def outcomes(out: Path):
    """Of every run in a comparison's folder."""
    return {folder.name: outcome(folder) for folder in sorted(out.iterdir()) if folder.is_dir()}
