"""Compare aggregators under a growing share of hostile clients: python simulations/hostile.py [OUT] [--set KEY=VALUE].

Runs `hostile-digits.toml` once for each attack and share (minutes) and leaves a comparison each in OUT/ATTACK-SHARE;
`python plots/hostile.py` draws them.
"""

import argparse
from pathlib import Path

from fedmerge.simulation import compare, load_config, make_config
from fedmerge.simulation.runs.config import parse_assignment

HERE = Path(__file__).parent
ATTACKS = {"sign_flip": {"scale": 4.0}, "backdoor": {"scale": 4.0}}
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=HERE.parent / "runs" / "hostile")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    base = load_config(HERE / "hostile-digits.toml")
    del base["attack"]
    settings = [parse_assignment(text) for text in arguments.assignments]
    for kind, options in ATTACKS.items():
        for share in SHARES:
            attack = {"attack": {"kind": kind, "share": share, "options": options}}
            outcome = compare(make_config(base, attack, *settings), arguments.out / f"{kind}-{share}", lambda row: None)
            print(f"{kind} {share}: {len(outcome.runs)} runs", *(str(failed.error) for failed in outcome.failed))


if __name__ == "__main__":
    main()
