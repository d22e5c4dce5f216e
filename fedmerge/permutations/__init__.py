"""Which neurons of a model may be re-ordered: derived from any torch model, verified, applied."""

from fedmerge.permutations.carrying import Plan, transport
from fedmerge.permutations.spec import Group, PermutationSpec, Site
from fedmerge.permutations.trace import trace
from fedmerge.permutations.verify import verify

__all__ = ["Group", "PermutationSpec", "Plan", "Site", "trace", "transport", "verify"]
