"""Draw accuracy and attack success against the share of attackers: python plots/hostile.py [RECORDS].

RECORDS is what `python simulations/hostile.py` left, runs/hostile where not given. Prints the numbers as well.
"""

import sys
from pathlib import Path
from statistics import fmean

from fedmerge.plotting import plot_hostile
from fedmerge.plotting.hostile_grid import outcomes

HERE = Path(__file__).parent


def main() -> None:
    records = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "runs" / "hostile"
    if not records.is_dir():
        sys.exit("there are no records: run `python simulations/hostile.py` first, or name its folder")
    folders = sorted(path for path in records.iterdir() if path.is_dir())
    ends = outcomes(folders)
    for attack, measure in sorted({(end.attack, end.measure) for end in ends}):
        shown = [end for end in ends if (end.attack, end.measure) == (attack, measure)]
        shares = sorted({end.share for end in shown})
        print(f"\n{attack}, {measure} in % at shares", *shares)
        for method in dict.fromkeys(end.method for end in shown):
            accuracies = [[e.value for e in shown if (e.method, e.share) == (method, share)] for share in shares]
            print(f"{method:34}", *(f"{fmean(values):6.1f}" if values else "     -" for values in accuracies))
    print(plot_hostile(folders, HERE))


if __name__ == "__main__":
    main()
