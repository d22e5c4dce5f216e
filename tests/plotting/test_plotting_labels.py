from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.plotting.labels import REACH, place, spread
from fedmerge.plotting.style import COLOURS, styles


def test_names_with_room_stay_at_their_ends():
    assert place([0.9, 0.5, 0.1], 0.05) == pytest.approx({0: 0.9, 1: 0.5, 2: 0.1})


def test_close_names_move_apart_evenly_the_better_one_on_top():
    assert place([0.5, 0.5], 0.1) == pytest.approx({0: 0.55, 1: 0.45})
    assert spread([0.50, 0.51, 0.9], 0.1) == pytest.approx([0.455, 0.555, 0.9])


def test_names_stay_within_the_axes():
    assert place([1.0, 1.0, 0.0], 0.1) == pytest.approx({0: 1.0, 1: 0.9, 2: 0.0})


def test_names_without_room_are_left_out_but_a_lone_one_further_down_is_kept():
    placed = place([0.9] * 20 + [0.1], 0.05)
    assert 0 in placed
    assert 19 not in placed
    assert placed[20] == pytest.approx(0.1)


@given(
    st.lists(st.floats(0, 1), max_size=15),
    st.floats(0.01, 0.3),
)
def test_placed_names_never_overlap_nor_stray(ends, height):
    placed = place(ends, height)
    middles = np.sort(list(placed.values()))
    assert (np.diff(middles) >= height - 1e-9).all()
    for index, middle in placed.items():
        assert -1e-9 <= middle <= 1 + 1e-9
        assert abs(middle - ends[index]) <= REACH * height + 1e-9
    assert bool(placed) == bool(ends)


def lightness(colour: str) -> float:
    """CIE L* of a hexadecimal colour."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    y = float(linear @ [0.2126, 0.7152, 0.0722])
    return 116 * np.cbrt(y) - 16 if y > 0.008856 else 903.3 * y


def test_styles_depend_on_the_set_of_methods_alone():
    assert styles(["b", "a", "a"]) == styles(["a", "b"])


def test_styles_can_be_told_apart_without_colour():
    looks = styles(f"method{index:02}" for index in range(15)).values()
    assert len({(look.marker, look.filled) for look in looks}) == 15
    assert len({(look.colour, look.dashes) for look in looks}) == 15


def test_colours_differ_in_grey():
    grey = [lightness(colour) for colour in COLOURS]
    assert np.diff(np.sort(grey)).min() > 5
    assert max(grey) < 75  # dark enough on white
    assert np.abs(np.diff([*grey, grey[0]])).min() > 14  # neighbours in the list
