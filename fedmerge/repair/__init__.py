"""After the merge: activations brought back to the size that they had before it."""

from fedmerge.repair.batch_norm import has_batch_norm, recalibrated
from fedmerge.repair.matched import repair_matched
from fedmerge.repair.rescale import Rescale

__all__ = ["Rescale", "has_batch_norm", "recalibrated", "repair_matched"]
