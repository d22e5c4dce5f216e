"""What hostile clients tell: how many examples they have, and metrics of every form."""

from __future__ import annotations

import math

from tests.hostile.kind import Kind, table

__all__ = ["METRICS", "WEIGHTS"]


def _weight(name: str, make, must_drop: bool = True) -> Kind:
    return Kind(name, "weight", make, must_drop)


WEIGHTS = table(
    "weight",
    *(_weight(f"{x}", lambda rng, honest, _, x=x: x) for x in (-1, 0, -5e-324, math.nan, math.inf, -math.inf)),
    *(
        _weight(f"{x}", lambda rng, honest, _, x=x: x, must_drop=False)
        for x in (5e-324, 1e-300, 1e-30, 0.5, 2.0**53, 2.0**53 - 1)
    ),
    *(_weight(f"{x:g}", lambda rng, honest, _, x=x: x) for x in (2.0**53 * 1.001, 2.0**63, 1e300, 1.7e308)),
    _weight("of sixty orders", lambda rng, honest, _: 10.0 ** rng.uniform(-45, 15), must_drop=False),
    _weight("a thousand times its own", lambda rng, honest, _: 1000 * honest, must_drop=False),
)


def _metrics(name: str, change, must_drop: bool = False) -> Kind:
    return Kind(name, "metrics", lambda rng, honest, _: change(honest), must_drop)


_NUMBERS = (math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, -1, 2**63 - 1, -(2**63), [], [0.5] * 3, [1], 10**30)
_WEIGHTS = ([], [8], [8, 8], [math.nan], 2**63 - 1, -(2**63))
_STEPS = (0, -1, 0.5, 1e300, 2**62, math.nan, math.inf, [], [3], [1, 2], 5e-324)

METRICS = table(
    "metrics",
    _metrics("no record", lambda honest: None, must_drop=True),
    _metrics("an empty record", lambda honest: {}, must_drop=True),
    _metrics("nothing but the examples", lambda honest: {"num-examples": honest["num-examples"]}),
    *(_metrics(f"examples {x}", lambda h, x=x: {**h, "num-examples": x}, must_drop=True) for x in _WEIGHTS),
    *(_metrics(f"a loss of {x}", lambda h, x=x: {**h, "train_loss": x}) for x in _NUMBERS if x != 10**30),
    *(_metrics(f"a metric {x} that others lack", lambda h, x=x: {**h, "new": x}) for x in (math.nan, [1, 2], 3)),
    *(_metrics(f"steps {x}", lambda h, x=x: {**h, "local-steps": x}) for x in _STEPS),
    *(_metrics(f"a momentum of {x}", lambda h, x=x: {**h, "momentum": x}) for x in (-1.0, 1.0, 2.0, 1e300, math.nan)),
    *(_metrics(f"a proximal term of {x}", lambda h, x=x: {**h, "proximal": x}) for x in (-1.0, 1e300, math.nan)),
    *(_metrics(f"counts {x}", lambda h, x=x: {**h, "class_counts": x}) for x in ([-1, 5, 3], [math.nan], 7, [])),
    _metrics("a thousand metrics", lambda honest: {**honest, **{f"metric-{i}": i for i in range(1000)}}),
    _metrics("a list of 100,000 numbers", lambda honest: {**honest, "list": [0.5] * 100_000}),
    _metrics("names of other statistics", lambda honest: {**honest, "gram": 1.0, "fisher_kfac": 2.0, "local_steps": 3}),
    _metrics("a name with control characters", lambda honest: {**honest, "\x1b[2J\x07loss\n": 1.0}),
)
