"""One small rule per ATen operator: which labels does it tie, and which does it hand on?"""

from fedmerge.permutations.rules import (  # noqa: F401  (each registers its rules)
    attention,
    convolution,
    drawing,
    linear,
    movement,
    normalisation,
    pointwise,
    recurrent,
    reduction,
    writing,
)
from fedmerge.permutations.rules.base import RULES, Call, Outcome, tensors_in

__all__ = ["RULES", "Call", "Outcome", "tensors_in"]
