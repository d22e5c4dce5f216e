"""Draw accuracy against bytes from the records of simulations/beyond.py: python plots/beyond.py [RECORDS]."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parent
STYLES = {
    "FedAvg, further rounds": ("tab:gray", "o-"),
    "fedavg+logistic_head": ("tab:orange", "s"),
    "fedavg+ridge_head+natural_gradient(count=3,refresh=false)": ("tab:green", "v"),
    "fedkfac": ("tab:blue", "D"),
    "fedkfac(budget=2.0)": ("tab:cyan", "P"),
    "fedkfac(budget=3.0)": ("tab:purple", "X"),
    "fedfisher(damping=0.5)": ("tab:brown", "^"),
    "untrained + logistic_head": ("tab:pink", "x"),
    "largest client + logistic_head": ("tab:red", "*"),
}
HIDDEN = ("fedavg", "largest client", "ensemble, class-weighted")
"""The first round of FedAvg, a point far below, and a line."""


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """For every method, the last point of each seed; for curves, the mean over seeds exchange by exchange."""
    curves: dict[str, list[np.ndarray]] = defaultdict(list)
    for row in rows:
        curves[row["method"]].append(np.array(row["curve"]))
    results = {}
    for method, each in curves.items():
        shortest = min(map(len, each))
        ends = np.stack([curve[-1] for curve in each])
        results[method] = {"curve": np.mean([curve[:shortest] for curve in each], axis=0), "ends": ends}
    return results


def draw(axis: Axes, record: dict[str, Any]) -> None:
    """One study: where every method ends, with the spread over seeds; FedAvg round by round."""
    results = summary(record["rows"])
    for method, (colour, style) in STYLES.items():
        if method not in results:
            continue
        curve, ends = results[method]["curve"], results[method]["ends"]
        if method != "FedAvg, further rounds":
            curve = ends.mean(0, keepdims=True)
        axis.plot(curve[:, 0], 100 * curve[:, 1], style, color=colour, label=method, markersize=6)
        if len(curve) == 1:
            low, high = 100 * ends[:, 1].min(), 100 * ends[:, 1].max()
            axis.vlines(curve[0, 0], low, high, color=colour, linewidth=1)
    others = [results[method]["ends"].mean(0) for method in results if method not in STYLES and method not in HIDDEN]
    if others:
        points = np.stack(others)
        axis.plot(
            points[:, 0], 100 * points[:, 1], ".", color="black", alpha=0.4, label="every other method, one exchange"
        )
    level = 100 * results["ensemble, class-weighted"]["ends"][:, 1].mean()
    axis.axhline(level, color="black", linestyle="--", linewidth=1, label="ensemble, class-weighted")
    seeds = len(results["fedkfac(budget=2.0)"]["ends"])
    axis.set_title(f"{record['study']} clients, {seeds} seeds (bars: least to most)", fontsize="medium")
    axis.grid(alpha=0.3)


def main() -> None:
    records = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "runs" / "beyond"
    files = sorted(records.glob("*.json"))
    columns = min(3, len(files))
    lines = -(-len(files) // columns)
    size = (5.2 * columns, 4.0 * lines + 1.0)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(files) :]:
        axis.remove()
    for axis, file in zip(axes.flat, files, strict=False):
        draw(axis, json.loads(file.read_text()))
    figure.supxlabel("sent by a client, in models (its model included)")
    figure.supylabel("test accuracy in %, Dirichlet 0.1")
    labels = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels.keys(), fontsize=8, loc="outside upper center", ncols=3)
    figure.savefig(HERE / "beyond.png", dpi=100)


if __name__ == "__main__":
    main()
