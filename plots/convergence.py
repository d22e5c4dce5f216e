"""The README's picture and table of the demo, from what `make demo` left under runs/demo."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tables import markdown, replace_between

from fedmerge.plotting import plot_convergence, summarise, summarise_references
from fedmerge.simulation.runs.results import choose_target

HERE = Path(__file__).parent


def table(records: Path, target: float | None) -> str:
    rows = [*summarise([records], target=target), *summarise_references([records])]
    reached = [] if target is None else [f"rounds to {100 * target:g} %"]
    lines = [["method", f"accuracy in % after {rows[0]['rounds']} rounds", *reached, "MB that clients sent"]]
    for row in rows:
        accuracy = f"{100 * row['final_accuracy_mean']:.1f} ± {100 * row['final_accuracy_std']:.1f}"
        if row["megabytes_up"] is None:  # a reference, no method
            lines.append([row["method"].strip("()"), accuracy, *("" for _ in reached), ""])
            continue
        hit = row["rounds_to_target"]
        rounds = ["never" if hit is None else f"{hit:.1f}" for _ in reached]
        lines.append([f"`{row['method']}`", accuracy, *rounds, f"{row['megabytes_up']:.2f}"])
    return markdown(lines)


def main() -> None:
    records = HERE.parent / "runs" / "demo"
    if not records.is_dir():
        sys.exit(f"{records} is missing: run `make demo` first")
    target = choose_target([records])
    print(plot_convergence([records], HERE / "convergence.png", target=target, columns=2))
    print(shutil.copyfile(records / "partition.png", HERE / "partition.png"))
    replace_between(HERE.parent / "README.md", "demo table", table(records, target))


if __name__ == "__main__":
    main()
