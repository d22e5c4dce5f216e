"""Recurrent layers: a unit is a row in every gate, and a column of the recurrent weight."""

from __future__ import annotations

import numpy as np

from fedmerge.permutations.labels import Labels, Vector
from fedmerge.permutations.rules.linear import along
from fedmerge.permutations.rules.pointwise import met
from fedmerge.permutations.rules.rule import Call, Outcome, rule
from fedmerge.permutations.values import Value, pin_all, settle, take_vector

__all__: list[str] = []

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*_GATES)
def recurrent(call: Call) -> Outcome:
    """LSTM, GRU and plain cells over time, stacked, in one or both directions."""
    labels = call.labels
    states = call["hx"] if isinstance(call["hx"], list | tuple) else [call["hx"]]
    weights: list[Value] = list(call["params"])
    directions = 2 if call["bidirectional"] else 1
    each = len(weights) // (call["num_layers"] * directions)
    x = call["input"]
    inner, others = take_vector(labels, x, -1, "an input mixed with other axes goes into a recurrent layer")
    for grid in others:
        labels.pin(grid, "a recurrent layer runs along it")
    if each > (4 if call["has_biases"] else 2):
        pin_all(labels, [*weights, *states], "projections of recurrent layers are not supported")
        labels.pin(inner, "projections of recurrent layers are not supported")
        return tuple(Value(shape) for shape in call.shapes)
    units: list[Vector] = []
    for layer in range(call["num_layers"]):
        outputs = []
        for direction in range(directions):
            start = (layer * directions + direction) * each
            outputs.append(_cell(labels, _GATES[call.operator], weights[start : start + each], inner))
        units += outputs
        inner = np.concatenate(outputs)
    for state in states:  # a start at zero is the same for every unit
        for grid in state.factors:
            labels.pin(grid, "it is a start that was handed over")
        if not state.uniform:
            for unit in units:
                labels.pin(unit, "its start was handed over")
    last = np.stack(units)[:, None, :]
    values: list[Value] = [settle(labels, call.shapes[0], [along(inner, -1, len(call.shapes[0]))])]
    for shape in call.shapes[1:]:
        values.append(settle(labels, shape, [last.reshape(last.shape[0], *(1,) * (len(shape) - 2), -1)]))
    return tuple(values)


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(call: Call) -> Outcome:
    """One step; a start of zeros is the same for every unit, and the state of another step is its units'."""
    labels, x = call.labels, call["input"]
    states = call["hx"] if isinstance(call["hx"], list | tuple) else [call["hx"]]
    inner, others = take_vector(labels, x, -1, "an input mixed with other axes goes into a recurrent layer")
    weights = [call[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if call[name] is not None]
    unit = _cell(labels, _GATES[call.operator.removesuffix("_cell")], weights, inner)
    grid = along(unit, -1, len(call.shape))
    met(labels, [Value(call.shape, (grid,)), *states], call.shape)
    return settle(labels, call.shape, [*others, grid]) if call.single else tuple(
        settle(labels, shape, [*others, grid]) for shape in call.shapes
    )  # fmt: skip


def _cell(labels: Labels, gates: int, weights: list[Value], inner: Vector) -> Vector:
    unit, _ = take_vector(labels, weights[1], 1, "")
    columns, _ = take_vector(labels, weights[0], 1, "")
    labels.tie(columns, inner)
    labels.consume(columns)
    labels.consume(unit)
    for weight in weights:
        rows, _ = take_vector(labels, weight, 0, "")
        labels.tie(rows.reshape(gates, -1), unit[None])
    return unit
