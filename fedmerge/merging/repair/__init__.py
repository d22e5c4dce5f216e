"""After the merge: activations brought back to the size that they had before it."""

from fedmerge.merging.repair.matched import repair_matched
from fedmerge.merging.repair.recalibrated import has_batch_norm, recalibrated
from fedmerge.merging.repair.rescale import Rescale

__all__ = ["Rescale", "has_batch_norm", "recalibrated", "repair_matched"]
