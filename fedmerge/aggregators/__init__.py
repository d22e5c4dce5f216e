"""Aggregators, one file per method; importing the registry finds them all."""

from fedmerge.aggregators.aggregator import Aggregator, Fold

__all__ = ["Aggregator", "Fold"]
