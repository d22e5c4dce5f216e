from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedmerge
from fedmerge.plotting.curve_labels import place, spread, wrapped
from fedmerge.plotting.style import COLOURS, styles


def test_names_with_room_stay_at_their_ends():
    assert place([0.9, 0.5, 0.1], [0.05] * 3) == pytest.approx([0.9, 0.5, 0.1])


def test_close_names_move_apart_evenly_the_better_one_on_top():
    assert place([0.5, 0.5], [0.1, 0.1]) == pytest.approx([0.55, 0.45])
    assert spread([0.50, 0.51, 0.9], [0.1] * 3) == pytest.approx([0.455, 0.555, 0.9])


def test_tall_names_take_more_room():
    assert place([0.5, 0.5], [0.1, 0.3]) == pytest.approx([0.6, 0.4])


def test_names_stay_within_the_axes():
    assert place([1.0, 1.0, 0.0], [0.1] * 3) == pytest.approx([1.0, 0.9, 0.0])


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 0.06)), max_size=15))
def test_no_name_is_dropped_or_covers_another(names):
    ends, heights = [end for end, _ in names], [height for _, height in names]
    middles = place(ends, heights)
    assert len(middles) == len(ends)
    order = np.argsort(middles)
    for lower, upper in itertools.pairwise(order):
        assert middles[upper] - middles[lower] >= (heights[lower] + heights[upper]) / 2 - 1e-9
    assert all(-1e-9 <= middle <= 1 + 1e-9 for middle in middles)


@pytest.mark.parametrize("name", ["fedavg", "krum(attackers=1,selected=12)+server_momentum(momentum=0.9)", "a" * 60])
def test_long_names_are_wrapped_and_whole(name):
    lines = wrapped(name).split("\n")
    assert max(map(len, lines)) <= 24
    assert "".join(lines).replace(" ", "") == name


def lightness(colour: str) -> float:
    """CIE L* of a hexadecimal colour."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    y = float(linear @ [0.2126, 0.7152, 0.0722])
    return 116 * np.cbrt(y) - 16 if y > 0.008856 else 903.3 * y


def test_styles_depend_on_the_set_of_methods_alone():
    assert styles(["b", "a", "a"]) == styles(["a", "b"])


def test_a_method_has_one_colour_in_every_figure():
    names = [*fedmerge.methods(), "somebody.else:Strategy"]
    together = styles([*names, *(f"{name}(option=1)" for name in names), *(f"{name} (before)" for name in names)])
    for name in names:
        alone = styles([name])[name].colour
        assert {together[variant].colour for variant in (name, f"{name}(option=1)", f"{name} (before)")} == {alone}


@pytest.mark.parametrize(
    "drawn",
    [
        ["fedavg", "fednova", "fedfisher", "pfnm", "fedkfac"],
        ["fedavg", "gamf", "rebasin", "c2m3", "otfusion", "fedma", "pfnm"],
        ["fedavg", "median", "trimmed_mean", "geometric_median", "krum", "median_norm_clipping"],
        ["fedavg", "fisher", "fedfisher", "regmean", "fedlpa", "mats", "maecho"],
        ["fedavg", "fedprox", "scaffold", "feddyn", "fednova", "fedkfac"],
    ],
)
def test_methods_of_a_kind_have_colours_of_their_own(drawn):
    assert len({look.colour for look in styles(drawn).values()}) == len(drawn)


def test_styles_can_be_told_apart_without_colour():
    variants = [f"fedfisher(damping={index})" for index in range(15)]
    for names in (variants, sorted(fedmerge.methods())):
        looks = list(styles(names).values())
        assert len({(look.colour, look.marker, look.filled, look.dashes) for look in looks}) == len(names)
    looks = styles(["fedavg", "fednova", "fedfisher", "pfnm", "fedkfac"]).values()
    assert len({(look.marker, look.filled) for look in looks}) == 5


def test_colours_differ_in_grey():
    grey = [lightness(colour) for colour in COLOURS]
    assert np.diff(np.sort(grey)).min() > 5
    assert max(grey) < 75  # dark enough on white
    assert np.abs(np.diff([*grey, grey[0]])).min() > 14  # neighbours in the list
