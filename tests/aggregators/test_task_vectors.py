"""Task vectors, and work on them part by part."""

import pytest
import torch

from fedmerge import ClientUpdate, MergeContext
from fedmerge.aggregators.task_vectors import TaskVectors
from fedmerge.errors import InvalidOption
from fedmerge.merging import build_pipeline
from tests.aggregators.task_vector_cases import close, drawn, merge_vectors


@pytest.mark.parametrize("method", ["consensus", "tall_masks", "emr"])
def test_parts_make_no_difference(method, monkeypatch):
    vectors = [drawn(i) for i in range(3)]
    whole, before = merge_vectors(method, vectors)
    monkeypatch.setattr("fedmerge.edits.delta.PIECE", 8)
    pieced, after = merge_vectors(method, vectors)
    close(pieced, whole, 1e-15)
    for client, part in before.personal.items():
        assert all(torch.equal(bits, after.personal[client].packed[name]) for name, bits in part.packed.items())
        assert part.scale == pytest.approx(after.personal[client].scale, rel=1e-12)


def test_half_precision_is_computed_in_float32():
    sent = [ClientUpdate(i, {"w": torch.full((3,), 1.0 + i).half()}, 1.0 + i) for i in range(2)]
    vectors = TaskVectors.of(sent, MergeContext(base={"w": torch.ones(3).half()}), "any")
    assert vectors.mean("w").dtype == torch.float32
    torch.testing.assert_close(vectors.mean("w"), torch.full((3,), 2 / 3))
    assert vectors.of_client(1, "w", slice(1, 3)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("method", ["consensus", "tall_masks", "emr", "iso_c", "tsv_m", "wudi"])
def test_without_a_base_the_error_tells_how_to_give_one(method):
    with pytest.raises(InvalidOption, match=f"{method} works on updates relative to the model"):
        build_pipeline(method).merge([ClientUpdate(0, {"w": torch.ones(2, 2)})], MergeContext(), buffers=())
