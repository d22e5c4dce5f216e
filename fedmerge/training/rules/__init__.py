"""Local rules: what methods change in the clients' training, one file each."""

from fedmerge.training.rules.control_variates import ControlVariates
from fedmerge.training.rules.dynamic import DynamicRegularizer
from fedmerge.training.rules.kept_momentum import KeptMomentum
from fedmerge.training.rules.local_rule import LocalRule, rule_of
from fedmerge.training.rules.proximal import Proximal

__all__ = ["ControlVariates", "DynamicRegularizer", "KeptMomentum", "LocalRule", "Proximal", "rule_of"]
