"""Draw the README's pictures from the records of `make demo`: python plots/convergence.py [RECORDS]."""

import shutil
import sys
from pathlib import Path

from fedmerge.plotting import plot_convergence

HERE = Path(__file__).parent


def main() -> None:
    records = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "runs" / "demo"
    if not records.is_dir():
        sys.exit(f"{records} is missing: run `make demo` first, or name the folder of a comparison")
    print(plot_convergence([records], HERE / "convergence.png", target=0.9))
    print(shutil.copyfile(records / "partition.png", HERE / "partition.png"))


if __name__ == "__main__":
    main()
