"""Operators that draw, and those that ask a tensor for no more than its form."""

from __future__ import annotations

from dataclasses import replace

from fedmerge.permutations.rules.rule import Call, Outcome, rule
from fedmerge.permutations.values import Value, pin_all, settle

__all__: list[str] = []


@rule("rand_like", "randn_like", "randint_like", "empty_like", "new_empty", "new_empty_strided")
def formed(call: Call) -> Outcome:
    """Entries that have nothing to do with those of the tensor that lends its form."""
    return Value(call.shape)


@rule("type_as")
def retyped(call: Call) -> Outcome:
    """Another tensor's type."""
    value: Value = call["self"]
    return replace(value, shape=call.shape, name=None)


@rule("dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout", "rrelu",
      "bernoulli", "poisson", "normal")  # fmt: skip
def drawn(call: Call) -> Outcome:
    """Nothing where it is off; else each position has draws of its own, which do not move with its neuron."""
    off = call.arguments.get("train", call.arguments.get("training")) is False or call.arguments.get("p") == 0.0
    if not off:
        pin_all(call.labels, call.tensors, f"{call.operator.rstrip('_')} draws for each position")
    value = call.tensors[0]
    values = tuple(settle(call.labels, shape, value.factors) for shape in call.shapes)
    return values[0] if call.single else values
