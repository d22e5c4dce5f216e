"""One Flower strategy per method, under the method's own name."""

from __future__ import annotations

from typing import Any, ClassVar

from fedmerge.strategies.merge_strategy import MergeStrategy

__all__ = ["GAMF", "PFNM", "FedAtt", "FedAvg", "FedFisher", "FedMA", "FedNova", "OTFusion"]


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


class PFNM(_Named):
    """:class:`MergeStrategy` with :class:`fedmerge.aggregators.pfnm.PFNM`; its options are keywords too.

    It has to trace the model: pass `model_fn` and `example`.

    Examples
    --------
    >>> PFNM(gamma=7.0).pipeline.aggregator.gamma
    7.0
    """

    method = "pfnm"


class FedMA(_Named):
    """:class:`MergeStrategy` with :class:`fedmerge.aggregators.fedma.FedMA`; its options are keywords too.

    It has to trace the model: pass `model_fn` and `example`.

    Examples
    --------
    >>> FedMA(retrain_epochs=2).pipeline.aggregator.retrain_epochs
    2
    """

    method = "fedma"


class OTFusion(_Named):
    """:class:`MergeStrategy` with :class:`fedmerge.aggregators.otfusion.OTFusion`; its options are keywords too.

    It has to trace the model: pass `model_fn` and `example`.

    Examples
    --------
    >>> OTFusion(solver="sinkhorn").pipeline.aggregator.solver
    'sinkhorn'
    """

    method = "otfusion"


class GAMF(_Named):
    """:class:`MergeStrategy` with :class:`fedmerge.aggregators.gamf.GAMF`; its options are keywords too.

    It has to trace the model: pass `model_fn` and `example`.

    Examples
    --------
    >>> GAMF(steps=4).pipeline.aggregator.steps
    4
    """

    method = "gamf"
