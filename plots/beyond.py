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

HERE = Path(__file__).parent
STYLES = {
    "FedAvg, further rounds": ("tab:gray", "o-"),
    "fedavg+logistic_head": ("tab:orange", "s-"),
    "fedavg+logistic_head+natural_gradient(count=2)": ("tab:green", "v-"),
    "fedkfac": ("tab:blue", "D-"),
    "fedkfac(budget=2.0)": ("tab:cyan", "P"),
    "fedkfac(budget=3.0)": ("tab:purple", "X"),
    "fedfisher(damping=0.5)": ("tab:brown", "^"),
    "untrained + logistic_head": ("tab:pink", "x"),
    "largest client + logistic_head": ("tab:red", "*"),
}


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """For every method, the last point of each seed; for curves, the mean over seeds exchange by exchange."""
    curves: dict[str, list[np.ndarray]] = defaultdict(list)
    for row in rows:
        curves[row["method"]].append(np.array(row["curve"]))
    found = {}
    for method, each in curves.items():
        shortest = min(map(len, each))
        ends = np.stack([curve[-1] for curve in each])
        found[method] = {"curve": np.mean([curve[:shortest] for curve in each], axis=0), "ends": ends}
    return found


def main() -> None:
    records = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "runs" / "beyond"
    files = sorted(records.glob("*.json"))
    figure, axes = plt.subplots(1, len(files), figsize=(6.5 * len(files), 4.8), squeeze=False, layout="constrained")
    for axis, file in zip(axes[0], files, strict=True):
        record = json.loads(file.read_text())
        found = summary(record["rows"])
        for method, (colour, style) in STYLES.items():
            curve, ends = found[method]["curve"], found[method]["ends"]
            if method != "FedAvg, further rounds":
                curve = ends.mean(0, keepdims=True)  # where it ends, with the spread over seeds
            axis.plot(curve[:, 0], 100 * curve[:, 1], style, color=colour, label=method, markersize=6)
            if len(curve) == 1:
                low, high = 100 * ends[:, 1].min(), 100 * ends[:, 1].max()
                axis.vlines(curve[0, 0], low, high, color=colour, linewidth=1)
        level = 100 * found["ensemble, class-weighted"]["ends"][:, 1].mean()
        axis.axhline(level, color="black", linestyle="--", linewidth=1, label="ensemble, class-weighted")
        seeds = len(found["fedkfac"]["ends"])
        axis.set(
            title=f"{record['data']}, Dirichlet 0.1, {seeds} seeds (bars: least to most)",
            xlabel="sent by a client, in models (its model included)",
            ylabel="test accuracy in %",
        )
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7, loc="lower right")
    figure.savefig(HERE / "beyond.png", dpi=120)


if __name__ == "__main__":
    main()
