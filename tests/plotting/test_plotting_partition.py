from __future__ import annotations

import numpy as np
import pytest

from fedmerge.errors import InvalidOption
from fedmerge.plotting import plot_partition
from fedmerge.plotting.canvas import blank
from fedmerge.plotting.cells import dot_areas, key_counts
from fedmerge.plotting.class_shares import draw_partition

pytest.importorskip("matplotlib")

import matplotlib as mpl
from matplotlib.collections import PathCollection


def drawn(counts, **options):
    with blank(8, 4) as figure:
        draw_partition(figure, np.asarray(counts, dtype=float), **options)
        figure.draw_without_rendering()
    return figure


def labels(ticks) -> list[str]:
    return [tick.get_text() for tick in ticks]


COUNTS = np.array([[100, 0, 25], [0, 50, 0], [4, 4, 4], [0, 0, 0]])


def test_bars_show_each_clients_size():
    bars = drawn(COUNTS).axes[0].patches
    assert [bar.get_height() for bar in bars] == [125, 50, 12, 0]
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([0, 1, 2, 3])


def test_dots_stand_where_examples_are_with_areas_in_proportion():
    dots = next(found for found in drawn(COUNTS).axes[1].collections if isinstance(found, PathCollection))
    size = {tuple(at): area for at, area in zip(dots.get_offsets().tolist(), dots.get_sizes(), strict=True)}
    assert set(size) == {(0, 0), (0, 2), (1, 1), (2, 0), (2, 1), (2, 2)}
    assert size[0, 2] / size[0, 0] == pytest.approx(0.25)
    assert size[1, 1] / size[0, 0] == pytest.approx(0.5)


def test_dots_touch_neither_each_other_nor_the_frame():
    figure = drawn(np.full((40, 10), 7))
    axes = figure.axes[1]
    dots = next(found for found in axes.collections if isinstance(found, PathCollection))
    diameter = np.sqrt(dots.get_sizes().max()) * figure.dpi / 72
    assert diameter < min(axes.bbox.width / 40, axes.bbox.height / 10)


def test_the_key_has_the_dots_sizes_and_lies_outside_the_panels():
    figure = drawn(COUNTS)
    (legend,) = figure.legends
    assert labels(legend.get_texts()) == ["5", "25", "100"]
    dots = next(found for found in figure.axes[1].collections if isinstance(found, PathCollection))
    areas = [handle.get_sizes()[0] for handle in legend.legend_handles]
    assert areas[-1] == pytest.approx(dots.get_sizes().max())
    assert areas[1] == pytest.approx(areas[-1] / 4)
    assert not any(legend.get_window_extent().overlaps(axes.get_tightbbox()) for axes in figure.axes)


def test_more_than_forty_clients_become_shades():
    counts = np.random.default_rng(0).integers(0, 400, (120, 10))
    figure = drawn(counts)
    (image,) = figure.axes[1].images
    assert np.asarray(image.get_array()) == pytest.approx(np.sqrt(counts.T))
    assert not figure.legends
    bar = figure.axes[2]
    assert labels(bar.get_yticklabels()) == ["0", "15", "75", "300"]
    assert bar.get_yticks() == pytest.approx(np.sqrt([0, 15, 75, 300]))


def test_many_classes_become_shades_too():
    assert len(drawn(np.ones((10, 100))).axes[1].images) == 1


def test_data_without_labels_is_bars_alone():
    figure = drawn([[5], [7], [2]], title="sizes")
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [5, 7, 2]
    assert labels(axes.get_xticklabels()) == ["0", "1", "2"]
    assert axes.get_title() == "sizes"


def test_names_of_clients_and_classes():
    names = {"class_names": ["cat", "dog", "cow"], "client_names": ["Ann", "Bob", "Cem", "Dee"]}
    axes = drawn(COUNTS, **names).axes[1]
    assert labels(axes.get_yticklabels()) == ["cat", "dog", "cow"]
    assert labels(axes.get_xticklabels()) == ["Ann", "Bob", "Cem", "Dee"]
    assert axes.get_ylim() == (2.5, -0.5)  # the first class on top
    assert {tick.get_rotation() for tick in axes.get_xticklabels()} == {0}
    axes = drawn(COUNTS, client_names=["hospital"] * 4).axes[1]
    assert {tick.get_rotation() for tick in axes.get_xticklabels()} == {90}


def test_areas_are_in_proportion_and_small_counts_stay_visible():
    assert dot_areas(np.array([0.0, 1, 50, 200]), 200, 100) == pytest.approx([0, 0.5, 25, 100])


@pytest.mark.parametrize(
    ("largest", "keys"), [(437, [20, 100, 400]), (1000, [50, 250, 1000]), (7, [1, 2, 7]), (1, [1]), (0, [1])]
)
def test_keys_are_round_and_within_the_data(largest, keys):
    assert key_counts(largest) == keys


@pytest.mark.parametrize("shape", [(4, 10), (20, 10), (120, 10), (1, 2), (300, 1), (3, 60)])
def test_the_file_is_a_picture_the_same_each_time_and_nothing_else_is_left(tmp_path, shape):
    counts = np.random.default_rng(1).integers(0, 90, shape)
    path = plot_partition(counts, tmp_path, title="who holds what")
    assert path == tmp_path / "partition.png"
    assert mpl.image.imread(path).shape[1] <= 2000
    assert plot_partition(counts, tmp_path / "b.png", title="who holds what").read_bytes() == path.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"partition.png", "b.png"}


def test_long_names_take_no_room_from_the_cells(tmp_path):
    def size(**options):
        path = plot_partition(COUNTS, tmp_path, **options)
        return mpl.image.imread(path).shape[:2]

    height, width = size()
    assert size(client_names=["a hospital far away"] * 4) > (height + 200, width - 1)
    assert size(class_names=["a class with a long name"] * 3)[1] > width + 200


def test_a_long_title_is_broken_into_lines():
    axes = drawn(COUNTS, title="who holds what " * 12).axes[0]
    lines = axes.get_title().split("\n")
    assert len(lines) > 1
    assert axes.title.get_window_extent().x1 < axes.figure.legends[0].get_window_extent().x0


@pytest.mark.parametrize("shape", [(4, 3), (50, 3), (4, 1)])
def test_no_examples_at_all_is_still_a_figure(tmp_path, shape):
    assert plot_partition(np.zeros(shape, dtype=int), tmp_path).stat().st_size > 0


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (np.ones(3), r"shape \[clients, classes\], not \[3\]"),
        (np.ones((0, 3)), r"not \[0, 3\]"),
        (np.array([[1, -1]]), "negative or missing"),
        (np.array([[1, np.nan]]), "negative or missing"),
        (np.array([["many"]]), "must be numbers"),
    ],
)
def test_counts_that_are_no_table(tmp_path, counts, words):
    with pytest.raises(InvalidOption, match=words):
        plot_partition(counts, tmp_path)


def test_lists_of_names_must_fit(tmp_path):
    with pytest.raises(InvalidOption, match="class_names has 2 entries for 3"):
        plot_partition(COUNTS, tmp_path, class_names=["a", "b"])
    with pytest.raises(InvalidOption, match="client_names has 1 entries for 4"):
        plot_partition(COUNTS, tmp_path, client_names=["a"])


def test_an_unknown_kind_of_file(tmp_path):
    with pytest.raises(InvalidOption, match=r"cannot draw to .*partition\.bmp"):
        plot_partition(COUNTS, tmp_path / "partition.bmp")
