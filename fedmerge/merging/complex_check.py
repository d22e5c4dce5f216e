"""Whether complex parameters can be merged as pairs of real ones."""

from __future__ import annotations

from fedmerge.aggregators.aligning import Aligning
from fedmerge.errors import ModelError
from fedmerge.layout import Layout
from fedmerge.merging.chain import Chain
from fedmerge.state import State
from fedmerge.statistics import LocalSteps

__all__ = ["check_complex"]


def check_complex(chain: Chain, reference: State, layout: Layout) -> None:
    """Refuse complex parameters where something goes by what numbers do in a layer, for which pairs are no numbers.

    Raises
    ------
    ModelError
        There are some, and clients measure their layers, neurons are matched by them, or refinements move them.
    """
    names = [name for name in layout.parameters if reference[name].is_complex()]
    needs = [name for name in chain.needs if name != LocalSteps.name]
    aggregator = chain.aggregator
    if not names or not (needs or aggregator.requires_model or isinstance(aggregator, Aligning) or chain.refinements):
        return
    what = needs[0] if needs else type(chain.refinements[0]).__name__ if chain.refinements else "matching neurons"
    raise ModelError(
        f"{type(aggregator).__name__} cannot merge complex parameters ({', '.join(map(repr, names[:3]))}), for "
        f"{what} goes by real ones: take a method that merges number by number, such as fedavg, fednova or median"
    )
