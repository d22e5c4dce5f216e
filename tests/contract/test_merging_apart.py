"""What a method says of the parts that may be merged apart is true: tensor by tensor, or layer by layer."""

import pytest
import torch

from fedmerge import MergeContext
from fedmerge.merging import Pipeline
from fedmerge.offline.tensor_weights import TensorGroup, merged_apart
from tests.contract.laws import base, updates
from tests.contract.table import ROWS


def apart(pipeline: Pipeline) -> bool:
    """Whether tensors or layers may be merged apart, by what the parts say of themselves."""
    if pipeline.refinements or pipeline.server_steps or pipeline.trajectories or pipeline.aggregator.local_rule:
        return False
    return pipeline.aggregator.separable != "never" and all(edit.tensor_by_tensor for edit in pipeline.edits)


SEPARABLE = [row for row in ROWS if not row.hears and not row.traces and apart(row.pipeline())]


@pytest.mark.parametrize("row", SEPARABLE, ids=str)
def test_parts_merged_apart_are_those_of_the_whole(row):
    pipeline, sent, start = row.pipeline(), updates(row), base()
    context = MergeContext(base=start, seed=1)
    whole = pipeline.merge(sent, context).state
    kinds = {name if pipeline.aggregator.separable == "tensor" else name.partition(".")[0] for name in start}
    groups = [frozenset(name for name in start if name == kind or name.startswith(f"{kind}.")) for kind in kinds]
    weights = tuple(update.weight for update in sent)
    buffers = [name for name in start if "running" in name or "num_batches" in name]
    parts = merged_apart(pipeline, [TensorGroup(g, weights) for g in groups], sent, context, buffers, row.method)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-6)


def test_many_methods_may():
    assert {"fedavg", "fisher", "regmean", "median", "slerp", "task_arithmetic"} <= {row.method for row in SEPARABLE}
