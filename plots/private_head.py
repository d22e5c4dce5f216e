"""Draw accuracy against epsilon of private heads, and print the numbers: python plots/private_head.py [RECORDS].

RECORDS is what `python simulations/private_head.py` left, runs/private-head where not given.
"""

import json
import sys
from math import log10
from pathlib import Path
from statistics import fmean

from fedmerge.plotting.canvas import blank, save
from fedmerge.plotting.style import styles

HERE = Path(__file__).parent
LABELS = {"own": "each client's answer protected", "shared": "the masked sum protected"}


def main() -> None:
    records = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "runs" / "private-head"
    records_read = [json.loads(file.read_text()) for file in sorted(records.glob("*.json"))]
    if not records_read:
        sys.exit("there are no records: run `python simulations/private_head.py` first, or name its folder")
    looks = styles((head, setting) for head in ("ridge_head", "logistic_head") for setting in LABELS)
    with blank(3.4 * len(records_read) + 2.6, 3.3) as figure:
        for axes, record in zip(figure.subplots(1, len(records_read), squeeze=False)[0], records_read, strict=True):
            rows = record["rows"]
            clients, seeds = record["clients"], len({row["seed"] for row in rows})
            print(
                f"\n{record['data']}: {clients} clients, {seeds} seeds, delta {record['delta']}, clip {record['clip']}"
            )
            for method, setting in dict.fromkeys((row["method"], row["setting"]) for row in rows):
                own = [row for row in rows if (row["method"], row["setting"]) == (method, setting)]
                _, _, head = method.partition("+")
                if setting in LABELS:
                    draw_curve(axes, own, f"{head}, {LABELS[setting]}", looks[head, setting])
                else:
                    values = [100 * row["accuracy"] for row in own]
                    print(f"{method:22} {setting:7} {fmean(values):5.1f} ({min(values):.1f} to {max(values):.1f})")
                    if setting == "plain" and head != "logistic_head":
                        draw_level(
                            axes, fmean(values), "the mean with ridge_head, no noise" if head else "the mean alone"
                        )
            axes.set_xscale("log")
            axes.set_xlabel(
                rf"$\epsilon$ at $\delta = 10^{{{round(log10(record['delta']))}}}$, of what is sent for the head"
            )
            axes.set_ylabel("test accuracy (%)")
            axes.set_ylim(0, 100)
            axes.set_title(f"{record['data']}, {clients} clients")
        handles = {
            label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles, loc="outside right center", frameon=False, handlelength=2.6)
        print(save(figure, HERE / "private-head.png"))


def draw_curve(axes, rows, label, look) -> None:
    """Mean over seeds at each noise, with a stroke from the lowest seed to the highest."""
    by_noise: dict[float, list[tuple[float, float]]] = {}
    for row in rows:
        by_noise.setdefault(row["noise_multiplier"], []).append((row["epsilon"], 100 * row["accuracy"]))
    points = [(fmean(e for e, _ in seeds), [value for _, value in seeds]) for seeds in by_noise.values()]
    for noise, (cost, values) in zip(by_noise, points, strict=True):
        shown = f"{fmean(values):5.1f} ({min(values):.1f} to {max(values):.1f})"
        print(f"{label:48} noise {noise:5.1f} epsilon {cost:6.2f}: {shown}")
        axes.vlines(cost, min(values), max(values), color=look.colour, linewidth=0.6, zorder=2)
    axes.plot(
        [cost for cost, _ in points],
        [fmean(values) for _, values in points],
        color=look.colour,
        dashes=look.dashes or (None, None),
        marker=look.marker,
        markersize=4,
        markerfacecolor=look.colour if look.filled else "white",
        label=label,
        zorder=3,
    )


def draw_level(axes, value: float, label: str) -> None:
    dotted = "alone" in label
    axes.axhline(value, color="0.5", linewidth=0.9, linestyle=":" if dotted else "--", label=label, zorder=1)


if __name__ == "__main__":
    main()
