"""Searches for coefficients: what is tried and what is learnt of it, whoever judges the models that come of them."""

from fedmerge.searching.search import Judged, Problem, Search, Span, Trial

__all__ = ["Judged", "Problem", "Search", "Span", "Trial"]
