"""Comparisons: configuration, experiment, runs, their records, and going on after an interruption."""
