"""Every way to ask for a model wrongly, and the message that it gets."""

from __future__ import annotations

import pytest

from fedmerge.errors import InvalidOption, ModelError, UnknownName
from fedmerge.models import build_model, model_options


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"'resnet9'\. Did you mean 'resnet8'\?.*vit.*module:factory"):
        build_model("resnet9", (3, 32, 32), 10, seed=0)
    with pytest.raises(UnknownName, match=r"'lenett'\. Did you mean 'lenet'\?"):
        model_options("lenett")


def test_unknown_option_names_those_that_exist() -> None:
    with pytest.raises(UnknownName, match=r"unknown mlp option 'hiden'\. Did you mean 'hidden'\? Known: bias, hidden"):
        build_model("mlp", (4,), 10, seed=0, hiden=3)


@pytest.mark.parametrize(
    ("name", "input_shape", "message"),
    [
        ("lenet", (64,), r"'lenet' wants images of shape \(channels, height, width\).*\(64,\).*'mlp'"),
        ("lenet", (28, 28), r"\(channels, height, width\).*\(28, 28\).*channel axis"),
        ("vgg9", (64,), r"'vgg9' wants images"),
        ("resnet8", (80,), r"'resnet8' wants images"),
        ("resnet20", (1, 3, 32, 32), r"'resnet20' wants images"),
        ("vit", (64,), r"'vit' wants images"),
        ("char_lstm", (1, 28, 28), r"'char_lstm' wants sequences of shape \(length,\).*\(1, 28, 28\)"),
        ("lenet", (1, 3, 28), r"at least 4x4 pixels.*have 3x28"),
        ("vgg9", (3, 7, 8), r"at least 8x8 pixels.*have 7x8"),
        ("resnet8", (3, 32, 4), r"'resnet8'.*at least 5x5 pixels.*have 32x4"),
        ("resnet20", (3, 1, 1), r"'resnet20'.*at least 5x5 pixels"),
        ("vit", (3, 2, 2), r"at least 4x4 pixels.*a patch has 4x4"),
        ("vit", (1, 30, 28), r"4x4 pixels, which do not tile 30x28.*'patch'"),
    ],
)
def test_input_that_the_model_cannot_take(name: str, input_shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(name, input_shape, 10, seed=0)


@pytest.mark.parametrize("input_shape", [(), (0, 8, 8), (1, -8, 8), (1.5,), (True,), "ab", 28, None])
def test_input_shape_that_is_none(input_shape: object) -> None:
    with pytest.raises(ModelError, match="input shape must be one or more sizes"):
        build_model("mlp", input_shape, 10, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, "10", None, True])
def test_number_of_classes(num_classes: object) -> None:
    with pytest.raises(ModelError, match="number of classes must be a whole number"):
        build_model("mlp", (4,), num_classes, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, "0", None, True])
def test_seed(seed: object) -> None:
    with pytest.raises(InvalidOption, match="seed of model 'mlp'"):
        build_model("mlp", (4,), 10, seed=seed)  # type: ignore[arg-type]


def test_largest_seed_and_list_shapes_are_taken() -> None:
    model = build_model("mlp", [1, 4], 10, seed=2**64 - 1)  # type: ignore[arg-type]
    assert model.get_parameter("layers.0.weight").shape == (100, 4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("logistic", {"bias": 1}, "'bias' of model 'logistic' must be true or false, not 1"),
        ("mlp", {"bias": "false"}, "'bias' of model 'mlp' must be true or false"),
        ("mlp", {"hidden": 0}, "'hidden' of model 'mlp' must be a whole number of at least 1, not 0"),
        ("mlp", {"hidden": [64, -1]}, "'hidden'.*not -1"),
        ("mlp", {"hidden": [64.0]}, "'hidden'.*not 64.0"),
        ("mlp", {"hidden": "64"}, "'hidden'.*not '64'"),
        ("mlp", {"hidden": True}, "'hidden'.*not True"),
        ("mlp", {"hidden": None}, "'hidden'.*not None"),
        ("lenet", {"channels": [6, 16, 32]}, r"'channels' of model 'lenet' needs 2 widths.*has 3"),
        ("lenet", {"channels": 6}, r"'channels' of model 'lenet' needs 2 widths.*has 1"),
        ("lenet", {"kernel": 0}, "'kernel' of model 'lenet'"),
        ("vgg9", {"channels": [8] * 5}, r"'channels' of model 'vgg9' needs 6 widths.*has 5"),
        ("vgg9", {"dropout": 1.0}, r"'dropout' of model 'vgg9' must lie in \[0, 1\), not 1.0"),
        ("vgg9", {"dropout": "a"}, "'dropout'.*not 'a'"),
        ("vgg9", {"dropout": float("nan")}, "'dropout'.*not nan"),
        ("resnet8", {"norm": "layer"}, "'norm' of model 'resnet8' must be 'batch' or 'group', not 'layer'"),
        ("resnet20", {"norm": None}, "'norm' of model 'resnet20'.*not None"),
        ("resnet8", {"norm": "group", "groups": 3}, "'groups' of model 'resnet8' must divide.*3.*16"),
        ("resnet8", {"groups": 0}, "'groups' of model 'resnet8' must be a whole number"),
        ("resnet20", {"width": 0}, "'width' of model 'resnet20'"),
        ("char_lstm", {"embedding": 0}, "'embedding' of model 'char_lstm'"),
        ("char_lstm", {"hidden": [8]}, "'hidden' of model 'char_lstm'"),
        ("char_lstm", {"layers": 0}, "'layers' of model 'char_lstm'"),
        ("vit", {"heads": 5}, "'heads' of model 'vit' must divide 'dim': 5 does not divide 64"),
        ("vit", {"patch": 0}, "'patch' of model 'vit'"),
        ("vit", {"depth": 0}, "'depth' of model 'vit'"),
        ("vit", {"dim": 0}, "'dim' of model 'vit'"),
        ("vit", {"mlp_ratio": 0.5}, "'mlp_ratio' of model 'vit'"),
    ],
)
def test_option_value(name: str, options: dict[str, object], message: str) -> None:
    input_shape = (9,) if name == "char_lstm" else (3, 32, 32)
    with pytest.raises(InvalidOption, match=message):
        build_model(name, input_shape, 10, seed=0, **options)
