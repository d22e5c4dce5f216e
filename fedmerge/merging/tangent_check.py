"""Which methods go with models that are linearised around a fixed point."""

from __future__ import annotations

from fedmerge.errors import InvalidOption
from fedmerge.merging.chain import Chain

__all__ = ["check_linearised"]


def check_linearised(chain: Chain) -> None:
    """Make sure that a method takes a linearised model for what it is: outputs that are affine in the parameters.

    Raises
    ------
    InvalidOption
        It re-orders neurons, which those of the expansion point do not follow; measures layers, whose inputs are those
        of the expansion point whatever the parameters; or changes the statistics of batch norms, which are part of the
        expansion.

    Examples
    --------
    >>> from fedmerge.merging import build_pipeline
    >>> check_linearised(build_pipeline("otfusion"))
    Traceback (most recent call last):
        ...
    fedmerge.errors.InvalidOption: OTFusion re-orders neurons, and a linearised model keeps those of the fixed point that it is expanded around: merge by a method that takes parameters as they are, such as fedavg or task_arithmetic
    """  # noqa: E501 - as the error is written
    who = type(chain.aggregator).__name__
    remedy = "merge by a method that takes parameters as they are, such as fedavg or task_arithmetic"
    if chain.aggregator.requires_model:
        raise InvalidOption(
            f"{who} re-orders neurons, and a linearised model keeps those of the fixed point that it is expanded "
            f"around: {remedy}"
        )
    norms = next((type(one).__name__ for one in chain.refinements if one.measures_norms), None)
    if norms is not None or chain.batch_norm == "recalibrate":
        raise InvalidOption(
            f"{norms or 'batch_norm = recalibrate'} measures batch norms anew, and their statistics are part of what a "
            "linearised model is expanded around: leave it out"
        )
    asked = [(who, statistic) for statistic in chain.aggregator.needs]
    asked += [(type(one).__name__, statistic) for one in chain.refinements for statistic in one.needs]
    for name, statistic in asked:
        if statistic.looks_inside:
            raise InvalidOption(
                f"{name} needs {statistic.name!r}, which is measured within layers, and those of a linearised model "
                f"are at the fixed point that it is expanded around, whatever its parameters: {remedy}"
            )
