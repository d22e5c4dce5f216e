"""Statistics: what clients measure about their model, one file each."""

from __future__ import annotations

from fedmerge.lookup.moved_modules import moved_name
from fedmerge.statistics.activations import Activations
from fedmerge.statistics.adapter_scaling import AdapterScaling
from fedmerge.statistics.batch_norm import BatchNormMoments, BatchNormSums
from fedmerge.statistics.class_counts import ClassCounts
from fedmerge.statistics.class_moments import ClassMoments
from fedmerge.statistics.fisher_diag import FisherDiag
from fedmerge.statistics.fisher_kfac import FisherKfac
from fedmerge.statistics.gram import Gram
from fedmerge.statistics.head import HeadGradient, HeadSums
from fedmerge.statistics.layer_statistic import ComparingStatistic
from fedmerge.statistics.local_steps import LocalSteps
from fedmerge.statistics.loss_gradient import EntropyGradient, LossGradient
from fedmerge.statistics.prefix_sums import PrefixSums
from fedmerge.statistics.refit import RefitSums
from fedmerge.statistics.secants import Secants
from fedmerge.statistics.sending.noise import NoisySums
from fedmerge.statistics.sending.settings import StatisticsSettings, statistic, tellable
from fedmerge.statistics.slopes import EntropySlopes, LossSlopes
from fedmerge.statistics.statistic_type import Batches, Statistic
from fedmerge.statistics.surgery_sums import SurgerySums

__all__ = [
    "Activations",
    "AdapterScaling",
    "BatchNormMoments",
    "BatchNormSums",
    "Batches",
    "ClassCounts",
    "ClassMoments",
    "ComparingStatistic",
    "EntropyGradient",
    "EntropySlopes",
    "FisherDiag",
    "FisherKfac",
    "Gram",
    "HeadGradient",
    "HeadSums",
    "LocalSteps",
    "LossGradient",
    "LossSlopes",
    "NoisySums",
    "PrefixSums",
    "RefitSums",
    "Secants",
    "Statistic",
    "StatisticsSettings",
    "SurgerySums",
    "statistic",
    "tellable",
]

__getattr__ = moved_name(__name__)
