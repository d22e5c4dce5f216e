"""The last line of a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmerge.commands.conclusion import conclude
from fedmerge.plotting import Run


def runs(**finals):
    return [
        Run(method, seed, ({"test_accuracy": 0.1}, {"test_accuracy": accuracy}, {"test_accuracy": None}), Path())
        for method, accuracies in finals.items()
        for seed, accuracy in enumerate(accuracies)
        if accuracy is not None
    ]


@pytest.mark.parametrize(
    ("finals", "sentence"),
    [
        ({"fedavg": [0.5, 0.6, 0.7], "pfnm": [0.8, 0.8, 0.8]}, "20.0 points above fedavg, and above it with each of 3"),
        ({"fedavg": [0.9, 0.6, 0.7], "pfnm": [0.8, 0.8, 0.8]}, "6.7 points above fedavg, but above it with 2 of 3"),
        (
            {"fedavg": [0.9], "pfnm": [0.8], "ties": [0.2]},
            "fedavg ended at 90.0 %, 10.0 points above pfnm, on one seed",
        ),
        ({"pfnm": [0.8], "ties": [0.2]}, "pfnm ended at 80.0 %, 60.0 points above ties, on one seed"),
        ({"pfnm": [0.8, None], "fedavg": [None, 0.2]}, "fedavg at 20.0 %, on other seeds"),
        ({"fedavg": [0.88], "fednova": [0.89, 0.8, 0.8]}, "1.0 points below fednova, on the one seed that both have"),
        ({"pfnm": [0.8, 0.9], "fedavg": [0.9, 0.8]}, "level with fedavg, and above it with 1 of 2 seeds"),
        ({"pfnm": [0.8, 0.8]}, "pfnm ended at 80.0 %. Next: add a method"),
        ({"fedavg": [0.5], "pfnm": [0.8]}, "Next: add seeds"),
        ({"fedavg": [0.5] * 3, "pfnm": [0.8] * 3}, "Next: your own model"),
        ({}, "No run was evaluated."),
    ],
)
def test_it_says_what_was_seen_and_what_to_try(finals, sentence):
    text = conclude(runs(**finals))
    assert sentence in text
    assert "\n" not in text
