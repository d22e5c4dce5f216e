"""How far apart models are: on the line between them, in activations, in weights, before and after matching."""

from fedmerge.diagnostics.barriers import Barrier, barrier
from fedmerge.diagnostics.distances import MatchingCosts, Similarity, matching_costs, similarity

__all__ = ["Barrier", "MatchingCosts", "Similarity", "barrier", "matching_costs", "similarity"]
