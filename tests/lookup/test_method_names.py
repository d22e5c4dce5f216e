"""How methods are written."""

from __future__ import annotations

import pytest

from fedmerge.errors import InvalidOption, UnknownName
from fedmerge.lookup.method_names import Part, own_parts, parse_method, split_methods
from fedmerge.merging import build_pipeline


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("fedavg", [("fedavg", {})]),
        ("fedavg+server_adam", [("fedavg", {}), ("server_adam", {})]),
        ("fedfisher(variant=diag, damping=1e-3)", [("fedfisher", {"variant": "diag", "damping": 1e-3})]),
        ("a(x=1)+b(y=true,z=+2)", [("a", {"x": 1}), ("b", {"y": True, "z": 2})]),
        ("a()", [("a", {})]),
        ("a(betas=[0.9, 0.99], x=1)", [("a", {"betas": [0.9, 0.99], "x": 1})]),
        ("a(path='b,c+d')+e", [("a", {"path": "b,c+d"}), ("e", {})]),
    ],
)
def test_parts_and_their_options(text, parts):
    assert parse_method(text) == [Part(*part) for part in parts]


@pytest.mark.parametrize("text", ["", "a(", "a)", "a(x)", "a(=1)", "a(x=1)b", "a((x=1))", "a+", "+a", "(x=1)"])
def test_what_cannot_be_read_is_named(text):
    with pytest.raises(InvalidOption, match=r"cannot read|lacks a name beside a \+"):
        parse_method(text)


def test_commas_in_parentheses_do_not_split():
    assert split_methods("a(x=1,y=2)+b, c ,") == ["a(x=1,y=2)+b", "c"]


def test_options_in_parentheses_override_those_of_the_part():
    options = {"fedfisher": {"variant": "kfac", "damping": 0.5}}
    aggregator = build_pipeline("fedfisher(variant=diag)", options).aggregator
    assert (aggregator.variant, aggregator.damping) == ("diag", 0.5)


def test_a_wrong_option_in_parentheses_is_named():
    with pytest.raises(UnknownName, match=r"varient.*variant"):
        build_pipeline("fedfisher(varient=diag)")


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("fedavg+server_adam", []),
        ("rebasin(combine=mine:Mean)", [Part("mine:Mean", {})]),
        ("mine:Mean", [Part("mine:Mean", {})]),
        ("dare(density=0.5)+mine:Mean(x=1)+mine:Step", [Part("mine:Mean", {"x": 1}), Part("mine:Step", {})]),
    ],
)
def test_the_parts_that_would_be_imported(method, own):
    assert own_parts(method) == own
