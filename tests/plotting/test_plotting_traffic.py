from __future__ import annotations

import pytest

from fedmerge.errors import InvalidOption, RecordError
from fedmerge.plotting import plot_traffic, read_runs, summarise_references, write_summary
from fedmerge.plotting.curves import curves, uploads
from fedmerge.plotting.reference_lines import references

REFERENCES = {"ensemble": 0.9, "best client": 0.5}


def test_uploads_are_running_totals_of_what_clients_sent(write_run, out):
    write_run("fedavg", 0, [0.1, 0.6, 0.8])
    write_run("fedavg", 1, [0.1, 0.6, 0.8], bytes_up=3_000_000)
    runs = read_runs([out])
    assert uploads(runs, curves(runs))["fedavg"].tolist() == [1.5, 3.5, 5.5]


def test_references_count_once_per_seed(write_run, out):
    for method in ("fedavg", "fisher"):
        for seed in (0, 1):
            values = {name: accuracy + 0.1 * seed for name, accuracy in REFERENCES.items()}
            write_run(method, seed, [0.1, 0.6], references=values)
    assert references(read_runs([out])) == {"ensemble": [0.9, 1.0], "best client": [0.5, 0.6]}
    rows = summarise_references([out])
    assert [row["method"] for row in rows] == ["(ensemble)", "(best client)"]
    assert rows[0]["final_accuracy_mean"] == pytest.approx(0.95)
    assert rows[0]["megabytes_up"] is None
    text = write_summary(rows, out / "summary.csv").read_text()
    assert "(ensemble),2,0.95" in text


def test_without_references_there_are_no_rows(write_run, out):
    write_run("fedavg", 0, [0.1, 0.6])
    assert references(read_runs([out])) == {}
    assert summarise_references([out]) == []


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_is_drawn_with_and_without_references(write_run, out, suffix):
    for method, bytes_up in (("fedavg", 1_000_000), ("fedfisher(variant=diag)", 2_000_000)):
        for seed in (0, 1, 2):
            write_run(method, seed, [0.1, 0.6 + 0.01 * seed], bytes_up=bytes_up, references=REFERENCES)
    path = plot_traffic([out], out / f"traffic{suffix}")
    assert path.stat().st_size > 5_000
    if suffix == ".svg":
        text = path.read_text()
        assert "ensemble 90.0 %" in text
        assert "fedfisher(variant=diag)" in text
        assert "mean over 3 seeds;" in text
        assert "strokes: each seed at the end" in text
        assert "dashed: the clients' own models" in text.replace("&apos;", "'").replace("&#x27;", "'")


def test_mistakes(write_run, out, tmp_path):
    write_run("fedavg", 0, [0.1, 0.6])
    with pytest.raises(InvalidOption, match=r"\.png"):
        plot_traffic([out], tmp_path / "traffic.txt")
    with pytest.raises(RecordError):
        plot_traffic([tmp_path / "none"], tmp_path)
