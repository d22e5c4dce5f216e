"""Updates for tests of methods that merge task vectors: drawn from a seed, around a base that is not zero."""

from __future__ import annotations

import numpy as np
import torch

from fedmerge import ClientUpdate, MergeContext
from fedmerge.merging import build_pipeline

SHAPES = {"layer.weight": (5, 4), "layer.bias": (5,), "kernel.weight": (3, 2, 2, 2), "gain": ()}


def drawn(seed: int, shapes=None) -> dict[str, np.ndarray]:
    """A task vector in float64."""
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape) for name, shape in (shapes or SHAPES).items()}


def base_of(shapes=None) -> dict[str, np.ndarray]:
    """The model that all started from."""
    return drawn(99, shapes)


def merge_vectors(method, vectors, weights=None, base=None):
    """The merged task vector, and the result: `vectors` are what clients changed."""
    shapes = {name: value.shape for name, value in vectors[0].items()}
    base = base_of(shapes) if base is None else base
    sent = [
        ClientUpdate(
            i, {n: torch.from_numpy(np.asarray(base[n] + v[n])) for n in base}, 1.0 if not weights else weights[i]
        )
        for i, v in enumerate(vectors)
    ]
    start = {name: torch.from_numpy(np.asarray(value)) for name, value in base.items()}
    result = build_pipeline(method).merge(sent, MergeContext(base=start, seed=3), buffers=())
    return {name: result.state[name].numpy() - base[name] for name in base}, result


def close(found, wanted, tolerance=1e-9):
    """Assert that two states agree in every tensor."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def own_vectors(result, base):
    """What each client's own model has changed of the base."""
    start = {name: torch.from_numpy(np.asarray(value)) for name, value in base.items()}
    models = {client: part.of(result.state, start) for client, part in result.personal.items()}
    return [{name: model[name].numpy() - base[name] for name in base} for model in models.values()]
