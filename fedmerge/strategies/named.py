"""One Flower strategy per method, under the method's own name."""

from __future__ import annotations

from typing import Any, ClassVar

from fedmerge.strategies.merge_strategy import MergeStrategy

__all__ = ["FedAtt", "FedAvg", "FedFisher", "FedNova"]


class _Named(MergeStrategy):
    method: ClassVar[str]

    def __init__(self, **keywords: Any) -> None:
        super().__init__(self.method, **keywords)


class FedAvg(_Named):
    """:class:`MergeStrategy` with :class:`fedmerge.aggregators.fedavg.FedAvg`; the same keywords.

    Examples
    --------
    >>> FedAvg(fraction_train=0.5).fraction_train
    0.5
    """

    method = "fedavg"


class FedNova(_Named):
    """:class:`MergeStrategy` with :class:`fedmerge.aggregators.fednova.FedNova`; its options are keywords too.

    Examples
    --------
    >>> FedNova(server_momentum=0.9).pipeline.aggregator.server_momentum
    0.9
    """

    method = "fednova"


class FedFisher(_Named):
    """:class:`MergeStrategy` with :class:`fedmerge.aggregators.fedfisher.FedFisher`; its options are keywords too.

    Examples
    --------
    >>> FedFisher(variant="diag").pipeline.needs
    ('fisher_diag',)
    """

    method = "fedfisher"


class FedAtt(_Named):
    """:class:`MergeStrategy` with :class:`fedmerge.aggregators.fedatt.FedAtt`; its options are keywords too.

    Examples
    --------
    >>> FedAtt(step_size=1.0).pipeline.aggregator.step_size
    1.0
    """

    method = "fedatt"
