"""The README's picture and table of the demo, from what `make demo` left under runs/demo."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from fedmerge.plotting import plot_convergence, summarise, summarise_references
from fedmerge.simulation.results import choose_target

HERE = Path(__file__).parent
BEGIN, END = "<!-- demo table: begin -->\n", "<!-- demo table: end -->\n"


def table(records: Path, target: float | None) -> str:
    rows = [*summarise([records], target=target), *summarise_references([records])]
    reached = "" if target is None else f" rounds to {100 * target:g} % |"
    lines = [f"| method | accuracy in % after {rows[0]['rounds']} rounds |{reached} MB that clients sent |"]
    lines.append("| --- | --- | --- | --- |" if reached else "| --- | --- | --- |")
    for row in rows:
        accuracy = f"{100 * row['final_accuracy_mean']:.1f} ± {100 * row['final_accuracy_std']:.1f}"
        if row["megabytes_up"] is None:
            cells = [row["method"].strip("()"), accuracy, *([""] if reached else []), ""]
        else:
            hit = row["rounds_to_target"]
            rounds = [] if not reached else ["never" if hit is None else f"{hit:.1f}"]
            cells = [f"`{row['method']}`", accuracy, *rounds, f"{row['megabytes_up']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    records, readme = HERE.parent / "runs" / "demo", HERE.parent / "README.md"
    if not records.is_dir():
        sys.exit(f"{records} is missing: run `make demo` first")
    target = choose_target([records])
    print(plot_convergence([records], HERE / "convergence.png", target=target, columns=2))
    print(shutil.copyfile(records / "partition.png", HERE / "partition.png"))
    text = readme.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    readme.write_text(f"{before}{BEGIN}{table(records, target)}{END}{after}")


if __name__ == "__main__":
    main()
