"""What a worker does with its share of a cohort: train the clients, measure, fold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import nn

from fedmerge.models.resize import resize
from fedmerge.simulation.flower_task import FIRST_NODE, failure_reason
from fedmerge.state import State
from fedmerge.statistics.compression import decode
from fedmerge.strategies.client_side import ClientSide
from fedmerge.strategies.cohort_order import CohortAnswer, CohortOrder, Trained
from fedmerge.strategies.measure import measured
from fedmerge.strategies.wire import to_arrays
from fedmerge.training.local import batches, train
from fedmerge.update import StackedUpdates

__all__ = ["answer"]


def answer(side: ClientSide, order: CohortOrder, nodes: Sequence[int], total: int) -> CohortAnswer:
    """Train the clients on `nodes`, and fold them where the method is a sum.

    Parameters
    ----------
    side
        The client side that would answer messages.
    order
        What to do.
    nodes
        This worker's share of the order's nodes, ascending.
    total
        Number of known clients.

    Returns
    -------
    CohortAnswer
        One that fails is named in it and stops nobody else.
    """
    result = CohortAnswer()
    blocks = _blocks(side, order, {node: node - FIRST_NODE for node in nodes}, total, result)
    if order.folds:
        result.partial = order.pipeline.fold(blocks, order.context, order.buffers)
    else:
        for block in blocks:
            # The blocks' tensors are the next client's too.
            kept = StackedUpdates(
                block.clients, {n: t.clone() for n, t in block.states.items()}, block.weights, block.statistics
            )
            result.updates += kept
    return result


def _blocks(
    side: ClientSide, order: CohortOrder, clients: dict[int, int], total: int, result: CohortAnswer
) -> Iterator[StackedUpdates]:
    """Clients trained one after the other; their facts go into `result`."""
    settings, seed, round = side.settings(order.config)
    base = order.context.required_base("a cohort")
    module = resize(side.template, base)
    for node, client in clients.items():
        try:
            data = side.data_fn(client, total)
            model = side.own_model(order.config, client) or _loaded(module, base)
            report = train(model, data.train_x, data.train_y, settings, seed=seed, client=client, round=round)
            loader = list(batches(data.train_x, data.train_y, device=next(model.parameters()).device))
            sent, error = measured(order.config, model, loader, report)
        except Exception as problem:
            result.failures.append((node, failure_reason(client, problem)))
            continue
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        examples = len(data.train_x)
        result.trained.append(Trained(client, node, examples, report.loss, error))
        result.bytes_up += reply_bytes(state) + sum(map(reply_bytes, sent.values())) + 8 * (3 + (error is not None))
        statistics = {name: decode(value) for name, value in sent.items()}
        stacked = {name: tensor.cpu()[None] for name, tensor in state.items()}
        yield StackedUpdates((client,), stacked, (float(examples),), (statistics,))


@torch.no_grad()
def _loaded(module: nn.Module, state: State) -> nn.Module:
    """`module` with the values of `state`, as good as new."""
    for name, tensor in module.state_dict().items():
        tensor.copy_(state[name])
    return module


def reply_bytes(state: State) -> int:
    """Bytes of these tensors in a message."""
    return sum(_array_bytes(tuple(tensor.shape), tensor.dtype) for tensor in state.values())


@lru_cache(maxsize=4096)
def _array_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return len(to_arrays({"": torch.empty(shape, dtype=dtype)})[""].data)
