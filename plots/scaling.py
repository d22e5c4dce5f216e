"""Draw the scaling study: python plots/scaling.py [runs/scaling.jsonl] [OUT]."""

import json
import sys
from collections import defaultdict
from pathlib import Path

from fedmerge.plotting.canvas import blank, picture_path, save
from fedmerge.plotting.style import styles

HERE = Path(__file__).parent
LABELS = {
    "sampled": "clients sampled a round",
    "known": "clients known",
    "workers": "workers (Ray actors)",
    "hidden": "hidden units",
}


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "runs" / "scaling.jsonl"
    if not path.is_file():
        sys.exit(f"{path} is missing: run `python benchmarks/scaling.py` first")
    points = defaultdict(list)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        points[row["axis"], row["system"]].append((row["value"], row["cpu_ms_per_update"]))
    axes = [axis for axis in LABELS if any(axis == known for known, _ in points)]
    looks = styles(system for _, system in points)
    with blank(2.4 * len(axes), 2.5) as figure:
        for number, axis in enumerate(axes):
            panel = figure.add_subplot(1, len(axes), number + 1)
            for system, look in looks.items():
                values, costs = zip(*sorted(points[axis, system]), strict=True)
                panel.plot(
                    values,
                    costs,
                    color=look.colour,
                    marker=look.marker,
                    markersize=5,
                    markerfacecolor=look.colour if look.filled else "white",
                    dashes=look.dashes,
                    label={"loop": "plain PyTorch loop"}.get(system, system),
                )
            ticks = sorted({value for value, _ in points[axis, "fedmerge"]})
            panel.set_xscale("log")
            panel.set_xticks(ticks, [f"{value // 1000}k" if value >= 10_000 else str(value) for value in ticks])
            panel.minorticks_off()
            panel.set_ylim(bottom=0)
            panel.set_xlabel(LABELS[axis])
            if number == 0:
                panel.set_ylabel("CPU ms per client update")
                panel.legend(frameon=False)
        out = Path(sys.argv[2]) if len(sys.argv) > 2 else HERE
        print(save(figure, picture_path(out, "scaling.png")))


if __name__ == "__main__":
    main()
