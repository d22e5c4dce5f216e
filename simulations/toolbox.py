"""Which methods of the toolbox help, and where: python -m simulations.toolbox [OUT] [--settings ...] [--methods ...].

Every setting of ``simulations/toolbox/`` is a federation; ``methods.toml`` there names the methods, each with at most
four candidates. First each method's candidates run on two seeds, and the clients' held-out accuracy after the last
round chooses one; the test set has no say. Then the chosen ones run on five other seeds. OUT (runs/toolbox) gets a
folder of records for each setting and stage, ``chosen.json``, and ``toolbox.csv``, a line for each setting and method:
accuracy, bytes, seconds of merging, and the difference to FedAvg on the same seeds with a 95 % interval and a p-value
of the paired t-test, corrected by Holm's method within the setting. ``python plots/toolbox.py`` draws it. Interrupted,
it goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from fedmerge.records.atomic_files import read_toml
from fedmerge.simulation import compare, load_config, make_config
from fedmerge.simulation.runs.unfinished import run_folder

HERE = Path(__file__).parent / "toolbox"
TUNING, SEEDS = (100, 101), (0, 1, 2, 3, 4)
MOST = 4  # candidates of a method, so that none is tuned more than another
REFERENCE = "fedavg"
PRETRAINED = ("class-groups", "domains")
"""Settings whose clients start from one base."""


def candidates() -> dict[str, list[str]]:
    """By name, what each method tries."""
    known: dict[str, list[str]] = read_toml(HERE / "methods.toml")["methods"]
    for name, tried in known.items():
        if not 1 <= len(tried) <= MOST:
            raise SystemExit(f"methods.toml: {name} has {len(tried)} candidates, where each may have {MOST} at most")
    return known


def pretrained(setting: str, out: Path) -> dict[str, Any]:
    """The base that clients of a setting start from, trained once; nothing for those that start from scratch."""
    if setting not in PRETRAINED:
        return {}
    base = out / "base.safetensors"
    if not base.exists():
        command = [sys.executable, "-m", "fedmerge", "pretrain", str(HERE / f"{setting}.toml"), "--share", "0.3"]
        subprocess.run([*command, "--out", str(base), "--epochs", "20", "--quiet"], check=True)
    return {"model": {"pretrained": str(base.resolve())}}


def run(setting: str, methods: Sequence[str], seeds: Sequence[int], out: Path) -> None:
    """All methods on all seeds; what is finished stays."""
    settings = {"methods": list(methods), "seeds": list(seeds), **pretrained(setting, out.parents[1])}
    outcome = compare(
        make_config(load_config(HERE / f"{setting}.toml"), settings), out, grow=out.exists(), resume=out.exists()
    )
    for failed in outcome.failed:
        print(f"{setting}: {failed.method} on seed {failed.seed} failed: {failed.error}", flush=True)


def last_rows(out: Path, methods: Sequence[str], seeds: Sequence[int]) -> pd.DataFrame:
    """The last round of every finished run, its bytes and seconds summed over all rounds."""
    rows: list[Mapping[str, Any]] = []
    for method in methods:
        for seed in seeds:
            record = run_folder(out, method, seed) / "rounds.jsonl"
            if not record.exists():
                continue
            table = pd.read_json(record, lines=True)
            sums = table[["bytes_up", "bytes_down", "seconds_merge"]].sum()
            rows.append({**table.iloc[-1], **sums, "method": method, "seed": seed})
    return pd.DataFrame(rows)


def choose(setting: str, known: Mapping[str, Sequence[str]], out: Path) -> dict[str, str]:
    """The candidate of each method that clients' held-out examples find best."""
    tried = sorted({method for candidates in known.values() for method in candidates})
    run(setting, tried, TUNING, out)
    held_out = last_rows(out, tried, TUNING).groupby("method")["client_accuracy"].agg(["mean", "count"])
    whole = held_out[held_out["count"] == len(TUNING)]["mean"]
    return {
        name: max(alive, key=lambda method: whole[method])
        for name, tried in known.items()
        if (alive := [method for method in tried if method in whole.index])
    }


def table(setting: str, chosen: Mapping[str, str], out: Path) -> pd.DataFrame:
    """A line for each method, compared with FedAvg on the same seeds."""
    rows = last_rows(out, list(dict.fromkeys(chosen.values())), SEEDS)
    accuracy = rows.pivot(index="seed", columns="method", values="test_accuracy") * 100
    lines = []
    for name, method in chosen.items():
        if method not in accuracy or accuracy[method].isna().any():
            continue
        own = rows[rows["method"] == method]
        difference = accuracy[method] - accuracy[chosen[REFERENCE]]
        mean, spread = difference.mean(), difference.std(ddof=1) / np.sqrt(len(difference))
        half = spread * stats.t.ppf(0.975, len(difference) - 1)
        # Without any difference there is nothing to test.
        p = 1.0 if spread == 0 else stats.ttest_1samp(difference, 0.0).pvalue
        lines.append(
            {
                "setting": setting,
                "name": name,
                "method": method,
                "accuracy": accuracy[method].mean(),
                "accuracy_std": accuracy[method].std(ddof=1),
                "difference": mean,
                "low": mean - half,
                "high": mean + half,
                "p": p,
                "megabytes_up": own["bytes_up"].mean() / 1e6,
                "seconds_merge": own["seconds_merge"].mean(),
            }
        )
    lines = pd.DataFrame(lines)
    others = lines["name"] != REFERENCE
    lines.loc[others, "p_holm"] = multipletests(lines.loc[others, "p"], method="holm")[1]
    return lines.sort_values("accuracy", ascending=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/toolbox"))
    parser.add_argument(
        "--settings", nargs="+", default=sorted(p.stem for p in HERE.glob("*.toml") if p.stem != "methods")
    )
    parser.add_argument("--methods", nargs="+", help="names in methods.toml; all where not given")
    arguments = parser.parse_args()
    known = candidates()
    if arguments.methods:
        known = {name: known[name] for name in dict.fromkeys([REFERENCE, *arguments.methods])}
    arguments.out.mkdir(parents=True, exist_ok=True)
    tables, all_chosen = [], {}
    for setting in arguments.settings:
        chosen = all_chosen[setting] = choose(setting, known, arguments.out / setting / "tuning")
        run(setting, list(dict.fromkeys(chosen.values())), SEEDS, arguments.out / setting / "final")
        tables.append(table(setting, chosen, arguments.out / setting / "final"))
        (arguments.out / "chosen.json").write_text(json.dumps(all_chosen, indent=2))
        pd.concat(tables).to_csv(arguments.out / "toolbox.csv", index=False)
        print(tables[-1].to_string(index=False, float_format=lambda value: f"{value:.2f}"), flush=True)


if __name__ == "__main__":
    main()
