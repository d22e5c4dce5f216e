"""Models of clients' own, out of the shared one."""

import pytest
import torch

from fedmerge.errors import InvalidOption
from fedmerge.personal import PersonalPart, pack_bits, parts_in, personalise, remembered_parts

BASE = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(0.5), "running_mean": torch.zeros(2)}
SHARED = {"w": torch.tensor([[2.0, 0.0], [3.0, 8.0]]), "b": torch.tensor(1.5), "running_mean": torch.ones(2)}
MASK = {"w": torch.tensor([[True, False], [True, True]]), "b": torch.tensor(True)}


def test_a_mask_and_a_number_make_a_model_and_buffers_stay_shared():
    own = personalise(SHARED, BASE, MASK, 0.5)
    assert own["w"].tolist() == [[1.5, 2.0], [3.0, 6.0]]
    assert own["b"].item() == 1.0
    assert torch.equal(own["running_mean"], SHARED["running_mean"])
    assert SHARED["w"].tolist() == [[2.0, 0.0], [3.0, 8.0]]


def test_dtypes_are_kept():
    half = [{name: tensor.half() for name, tensor in state.items()} for state in (SHARED, BASE)]
    own = personalise(*half, MASK, 0.5)
    assert {tensor.dtype for tensor in own.values()} == {torch.float16}
    assert own["w"].tolist() == [[1.5, 2.0], [3.0, 6.0]]


def test_a_tied_tensor_is_personal_under_all_its_names():
    shared, start = SHARED | {"head": SHARED["w"]}, BASE | {"head": BASE["w"]}
    assert personalise(shared, start, MASK, 0.5, {"head": "w"})["head"].tolist() == [[1.5, 2.0], [3.0, 6.0]]


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        ({"w": torch.ones(3, dtype=torch.bool)}, r"the mask of 'w' is \[3\], and that tensor of state is \[2, 2\]"),
        ({"v": torch.ones(3, dtype=torch.bool)}, "that tensor of state is missing"),
    ],
)
def test_a_mask_of_another_model_is_refused(mask, told):
    with pytest.raises(InvalidOption, match=told):
        personalise(SHARED, BASE, mask)
    with pytest.raises(InvalidOption, match="that tensor of base"):
        personalise({**SHARED, **mask}, BASE, mask)


def test_parts_survive_as_memory_and_count_a_bit_a_number():
    parts = [PersonalPart(client, {n: pack_bits(m) for n, m in MASK.items()}, 0.1 * client) for client in (12, 3)]
    found = parts_in({**remembered_parts(parts), "elsewhere": torch.zeros(1)})
    assert list(found) == [3, 12]
    assert [part.scale for part in found.values()] == [0.1 * 3, 0.1 * 12]
    assert found[3].bytes == 1 + 1 + 8
    assert torch.equal(found[12].of(SHARED, BASE)["w"], personalise(SHARED, BASE, MASK, 0.1 * 12)["w"])
    assert parts_in({}) == {}


def test_names_with_slashes_are_kept_apart():
    part = PersonalPart(1, {"block/scale": pack_bits(torch.tensor([True]))}, 2.0)
    assert parts_in(remembered_parts([part]))[1].packed.keys() == {"block/scale"}


def test_a_part_of_another_model_is_refused():
    part = PersonalPart(5, {"v": pack_bits(torch.ones(4, dtype=torch.bool))}, 1.0)
    with pytest.raises(InvalidOption, match="mask of client 5 is for 'v', which the model lacks"):
        part.of(SHARED, BASE)
