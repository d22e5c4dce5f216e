"""The table and the picture of clients that start apart, from runs/matching-digits (`make figures` makes it)."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean

from tables import markdown, replace_between

from fedmerge.plotting import plot_convergence, read_runs, summarise, summarise_references

HERE = Path(__file__).parent


def main() -> None:
    records = HERE.parent / "runs" / "matching-digits"
    if not records.is_dir():
        sys.exit(f"{records} is missing: fedmerge compare simulations/matching-digits.toml --out {records}")
    print(plot_convergence([records], HERE / "matching-digits.png", columns=2))
    first: dict[str, list[float]] = {}
    for run in read_runs([records]):
        first.setdefault(run.method, []).append(next(r["test_accuracy"] for r in run.rows if r["round"] == 1))
    rows = sorted(summarise([records], target=None), key=lambda row: fmean(first[row["method"]]))
    table = markdown(
        [
            ["", *(f"`{row['method']}`" for row in rows)],
            ["one round", *(f"{100 * fmean(first[row['method']]):.1f}" for row in rows)],
            [f"{rows[0]['rounds']} rounds", *(f"{100 * row['final_accuracy_mean']:.1f}" for row in rows)],
            [f"MB up, {rows[0]['rounds']} rounds", *(f"{row['megabytes_up']:.2f}" for row in rows)],
        ]
    )
    ends = {row["method"].strip("()"): 100 * row["final_accuracy_mean"] for row in summarise_references([records])}
    words = ", ".join(f"{name} {accuracy:.1f}" for name, accuracy in ends.items())
    replace_between(HERE.parent / "docs" / "matching.md", "matching table", f"{table}\nBeside them: {words}.\n")


if __name__ == "__main__":
    main()
