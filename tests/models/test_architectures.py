"""What each model is made of: sizes from the papers, options, norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedmerge.models import build_model


def shapes(name: str, input_shape: tuple[int, ...], **options: object) -> dict[str, tuple[int, ...]]:
    state = build_model(name, input_shape, 10, seed=0, **options).state_dict()
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("name", "input_shape", "classes", "options", "expected"),
    [
        ("logistic", (1, 28, 28), 10, {}, 784 * 10 + 10),
        ("mlp", (1, 28, 28), 10, {"hidden": (200, 200)}, 199_210),  # McMahan et al. 2017, "2NN"
        ("lenet", (1, 32, 32), 10, {}, 61_706),  # LeNet-5 with every map connected
        ("vgg9", (3, 32, 32), 10, {}, 3_491_530),  # FedMA's VGG-9
        # 3x3 convolutions 432 + 2*2304 + (4608+9216) + (18432+36864), projections 512 + 2048,
        # norms 2*(3*16 + 3*32 + 3*64), linear 650
        ("resnet8", (3, 32, 32), 10, {}, 78_042),
        ("resnet20", (3, 32, 32), 10, {}, 272_474),  # 0.27 M in He et al. 2015, table 6
        ("resnet20", (3, 32, 32), 10, {"norm": "group"}, 272_474),
        # embedding 80*8, LSTM 4*256*(8+256+2) + 4*256*(256+256+2), linear 257*80
        ("char_lstm", (80,), 80, {"hidden": 256}, 819_920),
    ],
)
def test_parameter_counts(
    name: str, input_shape: tuple[int, ...], classes: int, options: dict[str, object], expected: int
) -> None:
    model = build_model(name, input_shape, classes, seed=0, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("hidden", [[9, 5], (9, 5)])
def test_mlp_hidden(hidden: object) -> None:
    found = shapes("mlp", (2, 3), hidden=hidden)
    assert [found[f"layers.{index}.weight"] for index in range(3)] == [(9, 6), (5, 9), (10, 5)]


def test_one_number_is_one_layer_and_none_is_logistic_regression() -> None:
    assert shapes("mlp", (4,), hidden=9) == shapes("mlp", (4,), hidden=(9,))
    assert list(shapes("mlp", (4,), hidden=[]).values()) == list(shapes("logistic", (4,)).values())


def test_lenet_widths() -> None:
    found = shapes("lenet", (1, 28, 28), channels=[3, 5], hidden=11, kernel=3)
    assert found["conv1.weight"] == (3, 1, 3, 3)
    assert found["conv2.weight"] == (5, 3, 3, 3)
    assert found["linear.0.weight"] == (11, 5 * 5 * 5)  # 28 -> 26 -> 13 -> 11 -> 5
    assert found["linear.1.weight"] == (10, 11)


@pytest.mark.parametrize(
    ("side", "left"),
    [(8, 2), (19, 4), (20, 2), (28, 4)],  # padded below 20 pixels; 20 -> 16 -> 8 -> 4 -> 2
)
def test_lenet_pads_small_images_only(side: int, left: int) -> None:
    assert shapes("lenet", (1, side, side))["linear.0.weight"] == (120, 16 * left * left)


@pytest.mark.parametrize("kernel", range(1, 9))
@pytest.mark.parametrize("side", [4, 5, 7, 8, 12, 33])
def test_lenet_takes_any_kernel_on_any_image_from_four_pixels(kernel: int, side: int) -> None:
    model = build_model("lenet", (1, side, side), 3, seed=0, kernel=kernel, hidden=[])
    assert model(torch.zeros(1, 1, side, side)).shape == (1, 3)


def test_vgg_widths() -> None:
    found = shapes("vgg9", (3, 32, 32), channels=[2, 3, 4, 5, 6, 7], hidden=[9, 8])
    convolutions = [found[f"conv.{index}.weight"] for index in range(6)]
    assert convolutions == [(2, 3, 3, 3), *((n, n - 1, 3, 3) for n in range(3, 8))]
    assert [found[f"linear.{index}.weight"] for index in range(3)] == [(9, 7 * 4 * 4), (8, 9), (10, 8)]


def test_vgg_dropout_acts_in_training_only() -> None:
    model = build_model("vgg9", (1, 8, 8), 10, seed=0, channels=(4, 4, 8, 8, 8, 8), dropout=0.5)
    inputs = torch.ones(1, 1, 8, 8)
    torch.manual_seed(0)
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


def test_vgg_keeps_the_signal_through_nine_layers() -> None:
    model = build_model("vgg9", (3, 32, 32), 10, seed=0).eval()
    logits = model(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert 0.1 < logits.std() < 10


@pytest.mark.parametrize("name", ["logistic", "mlp", "lenet", "vgg9"])
def test_bias_can_be_left_out(name: str) -> None:
    assert any(key.endswith("bias") for key in shapes(name, (1, 8, 8)))
    assert not any(key.endswith("bias") for key in shapes(name, (1, 8, 8), bias=False))


@pytest.mark.parametrize(("name", "blocks"), [("resnet8", 3), ("resnet20", 9)])
def test_resnet_width_and_depth(name: str, blocks: int) -> None:
    found = shapes(name, (3, 32, 32), width=6)
    convolutions = [key for key in found if "conv" in key]
    assert len(convolutions) == 1 + 2 * blocks
    assert found["conv.weight"] == (6, 3, 3, 3)
    assert found[f"blocks.{blocks - 1}.conv2.weight"] == (24, 24, 3, 3)
    projections = {shape for key, shape in found.items() if key.endswith("shortcut.0.weight")}
    assert projections == {(12, 6, 1, 1), (24, 12, 1, 1)}


@pytest.mark.parametrize("name", ["resnet8", "resnet20"])
def test_only_batch_norm_has_buffers(name: str) -> None:
    batch = build_model(name, (1, 8, 8), 10, seed=0, width=4)
    group = build_model(name, (1, 8, 8), 10, seed=0, width=4, norm="group")
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in batch.modules())
    assert norms == {"resnet8": 9, "resnet20": 21}[name]
    assert len(list(batch.buffers())) == 3 * norms
    assert list(group.buffers()) == []
    assert not any(isinstance(module, nn.BatchNorm2d) for module in group.modules())


def test_resnet_groups() -> None:
    model = build_model("resnet8", (1, 8, 8), 10, seed=0, width=6, norm="group", groups=3)
    assert {module.num_groups for module in model.modules() if isinstance(module, nn.GroupNorm)} == {3}


def test_resnet_width_without_its_divisor_is_fine_under_batch_norm() -> None:
    assert shapes("resnet8", (1, 8, 8), width=5)["conv.weight"] == (5, 1, 3, 3)


def test_lstm_widths() -> None:
    found = shapes("char_lstm", (5,), embedding=3, hidden=4, layers=3)
    assert found["embedding.weight"] == (10, 3)
    assert found["lstm.weight_ih_l0"] == (16, 3)
    assert found["lstm.weight_hh_l2"] == (16, 4)
    assert "lstm.weight_hh_l3" not in found
    assert found["output.weight"] == (10, 4)


def test_lstm_sees_the_past_and_not_the_future() -> None:
    model = build_model("char_lstm", (6,), 10, seed=0)
    one = torch.tensor([[1, 2, 3, 4, 5, 6]])
    other = torch.tensor([[1, 2, 9, 4, 5, 6]])
    differs = (model(one) != model(other)).any(dim=2)[0]
    assert differs.tolist() == [False, False, True, True, True, True]


def test_vit_widths() -> None:
    found = shapes("vit", (3, 32, 32), dim=6, depth=2, heads=3, patch=8, mlp_ratio=4)
    assert found["patches.weight"] == (6, 3, 8, 8)
    assert found["positions"] == (1, 16, 6)
    assert found["blocks.1.linear1.weight"] == (24, 6)
    assert "blocks.2.linear1.weight" not in found
    assert found["blocks.0.attention.query.weight"] == (6, 6)


def test_vit_attends_across_patches_and_knows_their_places() -> None:
    model = build_model("vit", (1, 8, 8), 10, seed=0, dim=8, heads=2).eval()
    image = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(model(image), model(image.flip(3)), atol=1e-4)
    swapped = torch.cat([image[..., 4:], image[..., :4]], dim=3)  # the same patches, elsewhere
    assert not torch.allclose(model(image), model(swapped), atol=1e-6)
    with torch.no_grad():
        model.get_parameter("positions").zero_()
    torch.testing.assert_close(model(image), model(swapped))


def test_vit_heads_change_the_function_and_no_shape() -> None:
    one, four = (build_model("vit", (1, 8, 8), 10, seed=0, dim=8, heads=heads) for heads in (1, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), four.parameters(), strict=True))
    image = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(one(image), four(image))
