"""Draw one-shot comparisons, accuracy against bytes sent: python plots/one_shot.py [RECORDS ...].

Without arguments it draws every comparison that `make one-shot` left under runs/.
"""

import sys
from pathlib import Path

from fedmerge.plotting import plot_traffic

HERE = Path(__file__).parent


def main() -> None:
    paths = [Path(argument) for argument in sys.argv[1:]]
    records = paths or sorted((HERE.parent / "runs").glob("one-shot-*"))
    if not records:
        sys.exit("there are no records: run `make one-shot` first, or name the folders of comparisons")
    for folder in records:
        print(plot_traffic([folder], HERE / f"{folder.name}.png"))


if __name__ == "__main__":
    main()
