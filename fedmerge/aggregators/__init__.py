"""Aggregators, one file per method; importing the registry finds them all."""

from fedmerge.aggregators.base import Aggregator, Fold

__all__ = ["Aggregator", "Fold"]
