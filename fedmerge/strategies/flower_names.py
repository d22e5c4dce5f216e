"""Flower's own strategies under Flower's names, with Flower's options: the same results, and all that ours do besides.

Models go by name and keep their dtypes, bad updates are dropped with a warning, integer buffers stay whole numbers, and
every keyword of :class:`~fedmerge.strategies.MergeStrategy` is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ArrayRecord

from fedmerge.strategies.merge_strategy import MergeStrategy
from fedmerge.wire.record_values import from_arrays, to_arrays

__all__ = [
    "FedAdagrad",
    "FedAdam",
    "FedAvgM",
    "FedMedian",
    "FedProx",
    "FedTrimmedAvg",
    "FedYogi",
    "Krum",
    "MultiKrum",
]


class FedProx(MergeStrategy):
    """:class:`MergeStrategy` with :class:`fedmerge.aggregators.fedprox.FedProx`: sends `proximal_mu` to the clients.

    Examples
    --------
    >>> FedProx(proximal_mu=0.1).pipeline.aggregator
    FedProx(proximal_mu=0.1)
    """

    reads_messages = False

    def __init__(self, *, proximal_mu: float = 0.0, **keywords: Any) -> None:
        super().__init__("fedprox", **keywords, proximal_mu=proximal_mu)


class FedMedian(MergeStrategy):
    """:class:`MergeStrategy` with :class:`fedmerge.aggregators.median.Median`.

    Examples
    --------
    >>> FedMedian(fraction_train=0.5).pipeline.aggregator
    Median()
    """

    reads_messages = False

    def __init__(self, **keywords: Any) -> None:
        super().__init__("median", **keywords)


class FedTrimmedAvg(MergeStrategy):
    """:class:`MergeStrategy` with :class:`fedmerge.aggregators.trimmed_mean.TrimmedMean`; `beta` is its `trim`.

    Examples
    --------
    >>> FedTrimmedAvg(beta=0.25).pipeline.aggregator
    TrimmedMean(trim=0.25)
    """

    reads_messages = False

    def __init__(self, *, beta: float = 0.2, **keywords: Any) -> None:
        super().__init__("trimmed_mean", **keywords, trim=beta)


class MultiKrum(MergeStrategy):
    """:class:`MergeStrategy` with :class:`fedmerge.aggregators.krum.Krum` in Flower's form.

    Examples
    --------
    >>> MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2).pipeline.aggregator
    Krum(attackers=1.0, selected=2, form='flower')
    """

    reads_messages = False

    def __init__(self, *, num_malicious_nodes: int = 0, num_nodes_to_select: int = 1, **keywords: Any) -> None:
        super().__init__("krum", **keywords, attackers=num_malicious_nodes, selected=num_nodes_to_select, form="flower")


class Krum(MultiKrum):
    """:class:`MultiKrum` that selects one client.

    Examples
    --------
    >>> Krum(num_malicious_nodes=1).pipeline.aggregator.selected
    1
    """

    reads_messages = False

    def __init__(self, *, num_malicious_nodes: int = 0, **keywords: Any) -> None:
        super().__init__(num_malicious_nodes=num_malicious_nodes, num_nodes_to_select=1, **keywords)


class _Stepping(MergeStrategy):
    """A strategy that steps from the model it has sent, which may be set by hand."""

    reads_messages = False

    @property
    def current_arrays(self) -> ArrayRecord | None:
        """The model that all clients started from; None before the first round."""
        return None if self._base is None else to_arrays(self._base)

    @current_arrays.setter
    def current_arrays(self, arrays: ArrayRecord | Mapping[str, Any]) -> None:
        if isinstance(arrays, ArrayRecord):
            self._base = from_arrays(arrays)
        else:
            self._base = {name: torch.as_tensor(array).clone() for name, array in arrays.items()}


def _option(name: str) -> property:
    """An option of the server step, which may be set between rounds."""

    def read(strategy: MergeStrategy) -> Any:
        return getattr(strategy.pipeline.server_steps[0], name)

    def write(strategy: MergeStrategy, value: Any) -> None:
        first, *others = strategy.pipeline.server_steps
        changed: Any = replace(first, **{name: value})  # type: ignore[type-var]
        strategy.pipeline = replace(strategy.pipeline, server_steps=(changed, *others))

    return property(read, write, doc=f"{name} of the server step.")


class FedAvgM(_Stepping):
    """:class:`MergeStrategy` with :class:`fedmerge.server_steps.ServerMomentum` behind plain averaging.

    Examples
    --------
    >>> FedAvgM(server_momentum=0.9).pipeline.server_steps
    (ServerMomentum(momentum=0.9, learning_rate=1.0),)
    """

    reads_messages = False

    server_learning_rate = _option("learning_rate")
    server_momentum = _option("momentum")

    def __init__(self, *, server_learning_rate: float = 1.0, server_momentum: float = 0.0, **keywords: Any) -> None:
        super().__init__("fedavgm", **keywords, momentum=server_momentum, learning_rate=server_learning_rate)


class _FedOpt(_Stepping):
    """`eta_l`, the clients' learning rate, is kept but not sent, as with Flower: say ``lr`` in the `train_config`."""

    reads_messages = False

    eta = _option("learning_rate")
    beta_1 = _option("beta1")
    tau = _option("tau")

    def __init__(self, method: str, eta_l: float, **keywords: Any) -> None:
        super().__init__(method, **keywords, form="flower")
        self.eta_l = eta_l


class FedAdam(_FedOpt):
    """:class:`MergeStrategy` with :class:`fedmerge.server_steps.ServerAdam` in Flower's form behind plain averaging.

    `eta_l` is kept but not sent, as with Flower: say ``lr`` in the ``train_config``.

    Examples
    --------
    >>> FedAdam(eta=0.01).pipeline.server_steps
    (ServerAdam(learning_rate=0.01, beta1=0.9, beta2=0.99, tau=0.001, form='flower'),)
    """

    reads_messages = False

    beta_2 = _option("beta2")

    def __init__(
        self,
        *,
        eta: float = 1e-1,
        eta_l: float = 1e-1,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        **keywords: Any,
    ) -> None:
        super().__init__("fedadam", eta_l, **keywords, learning_rate=eta, beta1=beta_1, beta2=beta_2, tau=tau)


class FedYogi(_FedOpt):
    """:class:`MergeStrategy` with :class:`fedmerge.server_steps.ServerYogi` in Flower's form behind plain averaging.

    `eta_l` as for :class:`FedAdam`.

    Examples
    --------
    >>> FedYogi(tau=0.01).pipeline.server_steps[0].tau
    0.01
    """

    reads_messages = False

    beta_2 = _option("beta2")

    def __init__(
        self,
        *,
        eta: float = 1e-2,
        eta_l: float = 0.0316,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        **keywords: Any,
    ) -> None:
        super().__init__("fedyogi", eta_l, **keywords, learning_rate=eta, beta1=beta_1, beta2=beta_2, tau=tau)


class FedAdagrad(_FedOpt):
    """:class:`MergeStrategy` with :class:`fedmerge.server_steps.ServerAdagrad` in Flower's form behind plain averaging.

    `eta_l` as for :class:`FedAdam`.

    Examples
    --------
    >>> FedAdagrad(eta=0.05).eta
    0.05
    """

    reads_messages = False

    def __init__(self, *, eta: float = 1e-1, eta_l: float = 1e-1, tau: float = 1e-3, **keywords: Any) -> None:
        super().__init__("fedadagrad", eta_l, **keywords, learning_rate=eta, tau=tau)
