"""Refinements: stages after a merge in which clients send sums and the server improves the merged model."""

from fedmerge.privacy.accountant import epsilon
from fedmerge.questions import Trust
from fedmerge.refine.analytic_head import AnalyticHead
from fedmerge.refine.exchanged import Refined
from fedmerge.refine.gaussian_head import GaussianHead
from fedmerge.refine.guard import refine
from fedmerge.refine.logistic_head import LogisticHead
from fedmerge.refine.natural_gradient import NaturalGradient
from fedmerge.refine.prefix_regmean import PrefixRegMean
from fedmerge.refine.privacy import Privacy
from fedmerge.refine.recalibrate import Recalibrate
from fedmerge.refine.refinement import Proposal, Refinement, Step
from fedmerge.refine.ridge_head import RidgeHead
from fedmerge.refine.sequential_refit import SequentialRefit
from fedmerge.refine.surgery import Surgery

__all__ = [
    "AnalyticHead",
    "GaussianHead",
    "LogisticHead",
    "NaturalGradient",
    "PrefixRegMean",
    "Privacy",
    "Proposal",
    "Recalibrate",
    "Refined",
    "Refinement",
    "RidgeHead",
    "SequentialRefit",
    "Step",
    "Surgery",
    "Trust",
    "epsilon",
    "refine",
]
