"""Draw the toolbox study: python plots/toolbox.py [runs/toolbox/toolbox.csv ...] [--out PICTURE].

One panel a setting, one line a method, ordered by the mean difference to FedAvg over the settings: the difference in
points of accuracy on the same seeds, with its 95 % interval. Filled dots differ from FedAvg after Holm's correction.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from fedmerge.plotting.canvas import blank, picture_path, save

HERE = Path(__file__).parent
TITLES = {
    "label-skew": "label skew, one start",
    "apart": "models apart, merged once",
    "class-groups": "from a base, class groups",
    "domains": "from a base, turned images",
}
BETTER, WORSE, LEVEL = "#1b7837", "#b2182b", "#777777"
FLOOR = -25.0  # points: what lies below is drawn at the edge, with its number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", type=Path, default=[HERE.parent / "runs" / "toolbox" / "toolbox.csv"])
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    missing = [str(table) for table in arguments.tables if not table.is_file()]
    if missing:
        sys.exit(f"{missing[0]} is missing: run `python -m simulations.toolbox` first")
    rows = pd.concat(map(pd.read_csv, arguments.tables))
    rows = rows[rows["name"] != "fedavg"]
    order = rows.groupby("name")["difference"].mean().sort_values().index.tolist()
    settings = [setting for setting in TITLES if setting in set(rows["setting"])]
    with blank(7.6, 0.7 + 0.145 * len(order)) as figure:
        panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
        for panel, setting in zip(panels, settings, strict=True):
            panel.axvline(0.0, color="#333333", linewidth=0.8)
            for row in rows[rows["setting"] == setting].itertuples():
                place, sure = order.index(row.name), row.p_holm < 0.05
                colour = LEVEL if not sure else BETTER if row.difference > 0 else WORSE
                shown = max(row.difference, FLOOR)
                panel.plot([max(row.low, FLOOR), max(row.high, FLOOR)], [place, place], color=colour, linewidth=1)
                panel.plot(shown, place, "o", color=colour, markersize=3.2, markerfacecolor=colour if sure else "white")
                if row.difference < FLOOR:
                    edge = max(row.high, FLOOR)
                    panel.annotate(f"{row.difference:.0f}", (edge, place), xytext=(4, 0), va="center",
                                   textcoords="offset points", fontsize=6, color=colour)  # fmt: skip
            panel.set_title(TITLES[setting], fontsize=8)
            panel.set_xlim(FLOOR - 1, None)
            panel.grid(axis="y", color="#eeeeee", linewidth=0.6)
        panels[0].set_yticks(range(len(order)), order, fontsize=6.5)
        panels[0].set_ylim(-0.8, len(order) - 0.2)
        figure.supxlabel("points of test accuracy above FedAvg on the same seeds, with 95 % interval", fontsize=8)
        print(save(figure, picture_path(arguments.out, "toolbox.png")))


if __name__ == "__main__":
    main()
