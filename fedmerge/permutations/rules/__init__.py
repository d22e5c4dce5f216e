"""One small rule per ATen operator: which labels does it tie, and which does it hand on?"""

from fedmerge.permutations.rules import (  # noqa: F401  (each registers its rules)
    attention,
    convolution,
    linear,
    movement,
    normalisation,
    pointwise,
    random_draws,
    recurrent,
    reduction,
    writing,
)
from fedmerge.permutations.rules.rule import RULES, Call, Outcome, tensors_in

__all__ = ["RULES", "Call", "Outcome", "tensors_in"]
