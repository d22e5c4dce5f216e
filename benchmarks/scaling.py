"""How a round's cost grows: with clients sampled, clients known, workers, and the width of the model.

    python benchmarks/scaling.py [--axes sampled,known,workers,hidden] [--rounds 4] [--out runs/scaling.jsonl]

Around W3 of `fedmerge bench` (drawn clients of 20 examples, MLP 784-32-10) one number changes at a time. Every point
runs the plain loop and fedmerge in turn, each in a fresh process, and writes a line of JSON for each: the row of
`fedmerge bench --json` with `axis` and `value` before it. `python plots/scaling.py` draws them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from benchmarks.rounds import Task, find_workload, measure, rows

AXES = {
    "sampled": (20, 50, 100, 200, 500),
    "known": (1_000, 10_000, 100_000, 1_000_000),
    "workers": (1, 2),
    "hidden": (32, 100, 300, 1_000),
}


def task(axis: str, value: int, rounds: int, data_dir: Path | None) -> Task:
    base = find_workload("W3")
    changes: dict[str, dict[str, object]] = {
        "sampled": {"sampled": value},
        "known": {"clients": value},
        "workers": {},
        "hidden": {"hidden": (value,)},
    }
    workload = replace(base, name=f"{axis}={value}", **changes[axis])  # type: ignore[arg-type]
    return Task(workload, rounds, data_dir=data_dir, workers=value if axis == "workers" else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling.jsonl"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w") as file:
        for axis in arguments.axes.split(","):
            for value in AXES[axis]:
                for row in rows(measure(task(axis, value, arguments.rounds, arguments.data_dir), ["loop", "fedmerge"])):
                    line = json.dumps({"axis": axis, "value": value, **row})
                    print(line, flush=True)
                    file.write(f"{line}\n")
                    file.flush()


if __name__ == "__main__":
    main()
