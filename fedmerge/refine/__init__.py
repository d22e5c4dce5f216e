"""Refinements: stages after a merge in which clients send sums and the server improves the merged model."""

from fedmerge.refine.base import Proposal, Refinement, Step
from fedmerge.refine.guard import Refined, refine
from fedmerge.refine.logistic_head import LogisticHead
from fedmerge.refine.natural_gradient import NaturalGradient
from fedmerge.refine.privacy import Privacy, epsilon
from fedmerge.refine.ridge_head import RidgeHead

__all__ = [
    "LogisticHead",
    "NaturalGradient",
    "Privacy",
    "Proposal",
    "Refined",
    "Refinement",
    "RidgeHead",
    "Step",
    "epsilon",
    "refine",
]
