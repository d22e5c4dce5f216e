from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from fedmerge.errors import InvalidOption, RecordError, UnknownName
from fedmerge.plotting import plot_convergence, plot_traffic, read_runs
from fedmerge.plotting.canvas import blank
from fedmerge.plotting.convergence import draw_convergence
from fedmerge.plotting.curves import Curve, curves

pytest.importorskip("matplotlib")

import matplotlib as mpl
from matplotlib.collections import PolyCollection
from matplotlib.text import Annotation, Text


def synthetic(method: str, final: float, *, points: int = 11, cost: float = 1.0, seeds: int = 3) -> Curve:
    x = np.arange(points, dtype=float)
    accuracy = final - (final - 10) * np.exp(-x / 2)
    width = np.full(points, 2.0) if seeds > 1 else None
    return Curve(method, seeds, accuracy, width, x, cost * x, cost * x)


def drawn(found: list[Curve], **options: float):
    with blank(10, 3.3) as figure:
        draw_convergence(figure, found, **options)
        figure.draw_without_rendering()
    return figure


def names_at_ends(axes) -> dict[str, Annotation]:
    return {text.get_text(): text for text in axes.texts if isinstance(text, Annotation)}


MANY = [synthetic(f"method_number_{index}", 95 - 0.3 * index) for index in range(14)]
STUCK = synthetic("stuck", 10.0)


def test_three_panels_share_the_accuracy_axis_and_hold_a_line_per_method(write_run, out):
    for method, seed in itertools.product(("fedavg", "fednova"), (0, 1)):
        write_run(method, seed, [0.1, 0.5 + 0.1 * seed, 0.8])
    figure = drawn(curves(read_runs([out])))
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "round",
        "megabytes sent (up + down)",
        "seconds (training + merging)",
    ]
    assert figure.axes[0].get_ylabel() == "test accuracy (%)"
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    for axes, last in zip(figure.axes, (2, 6, 7), strict=True):
        assert [line.get_label() for line in axes.lines] == ["fedavg", "fednova"]
        assert axes.lines[0].get_xdata()[-1] == pytest.approx(last)
        assert axes.lines[0].get_ydata() == pytest.approx([10, 55, 80])


def test_local_steps_have_a_panel_where_every_run_counts_them(write_run, out):
    for seed in (0, 1):
        write_run("fedma", seed, [0.1, 0.5, 0.8], local_steps=40 + 20 * seed)
        write_run("fedavg", seed, [0.1, 0.5, 0.8], local_steps=30)
    write_run("fedavg", 2, [0.1, 0.5, 0.8], out="UNCOUNTED", local_steps=None)
    figure = drawn(curves(read_runs([out])))
    axes = {panel.get_xlabel(): panel for panel in figure.axes}["local steps (all clients)"]
    ends = {line.get_label(): line.get_xdata().tolist() for line in axes.lines}
    assert ends == {"fedma": [50, 100, 150], "fedavg": [30, 60, 90]}
    assert len(drawn(curves(read_runs([out, out.parent / "UNCOUNTED"]))).axes) == 3


def test_bands_lie_around_the_mean_and_within_0_to_100():
    figure = drawn([synthetic("a", 99.5), synthetic("b", 50, seeds=1)])
    for axes in figure.axes:
        (band,) = [found for found in axes.collections if isinstance(found, PolyCollection)]
        y = band.get_paths()[0].vertices[:, 1]
        assert y.min() == pytest.approx(8)
        assert y.max() == pytest.approx(100)


def test_a_target_is_a_line_in_each_panel_with_its_name_beside_the_last():
    figure = drawn([synthetic("a", 80)], target=0.9)
    for axes in figure.axes:
        assert any(list(line.get_ydata()) == [90, 90] for line in axes.lines)
    assert "target\n90 %" in names_at_ends(figure.axes[-1])
    assert figure.axes[0].get_ylim()[1] > 90


def test_the_legend_names_every_method_and_covers_no_panel():
    figure = drawn([*MANY, STUCK])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [curve.method for curve in [*MANY, STUCK]]
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= figure.bbox.y0
    for axes in figure.axes:
        assert not box.overlaps(axes.get_tightbbox())


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([synthetic("a", 50, seeds=1)], "one seed"),
        ([synthetic("a", 50)], "mean over 3 seeds, band: 90 % confidence interval"),
        ([synthetic("a", 50, seeds=2), synthetic("b", 50)], "mean over 2 to 3 seeds, band: 90 % confidence interval"),
    ],
)
def test_the_legend_says_what_a_curve_is(found, words):
    assert drawn(found, confidence=0.9).legends[0].get_title().get_text() == words


def test_names_at_the_ends_overlap_neither_each_other_nor_a_panel():
    figure = drawn([*MANY, STUCK])
    names = names_at_ends(figure.axes[0])
    assert set(names) == {curve.method for curve in [*MANY, STUCK]}
    boxes = [Text.get_window_extent(text) for text in names.values()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.overlaps(axes.bbox) for box in boxes for axes in figure.axes)


def test_curves_that_end_early_and_long_names_are_named_too_the_long_ones_in_lines():
    long = "krum(attackers=1,selected=3)+server_momentum"
    found = [synthetic("a", 90), synthetic("b", 89), synthetic("one_shot", 70, points=2), synthetic(long, 60)]
    figure = drawn(found)
    names = names_at_ends(figure.axes[0])
    assert {name.replace("\n", "").replace(" ", "") for name in names} == {"a", "b", "one_shot", long}
    assert max(len(line) for name in names for line in name.split("\n")) <= 24
    assert names["one_shot"].xy[0] == 1


@pytest.mark.parametrize(("columns", "inches"), [(1, 3.4), (2, 7.0)])
@pytest.mark.parametrize("names", [2, 14])
def test_pictures_fit_one_column_or_two_of_print_with_every_name(columns, inches, names, write_run, out, tmp_path):
    for index in range(names):
        write_run(f"method_number_{index}", 0, [0.1, 0.5 + 0.01 * index])
    path = plot_convergence([out], tmp_path / "a.svg", columns=columns)
    text = path.read_text()
    assert f'width="{72 * inches:g}pt"' in text
    assert text.count("<!-- method_number_0 -->") == 2  # in the legend, and at the end of its curve
    picture = plot_traffic([out], tmp_path / "t.svg", columns=columns).read_text()
    assert f'width="{72 * inches:g}pt"' in picture


def test_panels_can_be_chosen(write_run, out, tmp_path):
    write_run("fedavg", 0, [0.1, 0.5])
    text = plot_convergence([out], tmp_path / "a.svg", against=["seconds", "rounds"]).read_text()
    assert "<!-- round -->" in text
    assert "seconds (training + merging)" in text
    assert "megabytes" not in text
    with pytest.raises(UnknownName, match="seconds"):
        plot_convergence([out], tmp_path / "b.svg", against=["second"])
    with pytest.raises(InvalidOption, match="local steps"):
        plot_convergence([out], tmp_path / "b.svg", against=["steps"])
    with pytest.raises(InvalidOption, match="1 column or 2"):
        plot_convergence([out], tmp_path / "b.svg", columns=3)


def test_every_line_is_within_the_limits():
    figure = drawn([*MANY, STUCK])
    low, high = figure.axes[0].get_ylim()
    for line in figure.axes[0].lines:
        assert low < line.get_ydata().min()
        assert line.get_ydata().max() < high


def test_ticks_of_rounds_are_whole():
    for points in (2, 4, 11, 101):
        ticks = drawn([synthetic("a", 90, points=points)]).axes[0].get_xticks()
        assert np.array_equal(ticks, np.round(ticks))


def test_costs_that_differ_widely_turn_the_axis_logarithmic_without_the_free_round():
    figure = drawn([synthetic("cheap", 90), synthetic("dear", 95, cost=50)])
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "log", "log"]
    assert figure.axes[1].get_xlabel() == "megabytes sent (up + down), log scale"
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [11, 11]
    assert [len(line.get_xdata()) for line in figure.axes[1].lines] == [10, 10]


def test_numbers_on_logarithmic_axes_are_written_plainly_and_do_not_touch():
    figure = drawn([synthetic("cheap", 90, cost=0.013), synthetic("dear", 95, cost=0.31)])
    figure.draw_without_rendering()
    for axes in figure.axes[1:]:
        ticks = axes.xaxis.get_ticklabels(which="both")
        shown = [text for text in ticks if text.get_text() and axes.bbox.x0 <= text.get_window_extent().x1]
        assert [text.get_text() for text in shown if "$" in text.get_text()] == []
        boxes = sorted((text.get_window_extent() for text in shown), key=lambda box: box.x0)
        assert len(boxes) > 2
        assert all(one.x1 <= other.x0 for one, other in itertools.pairwise(boxes))


def test_losses_that_fall_by_decades_stand_on_a_logarithmic_axis_with_every_mean_in_view():
    x = np.arange(5, dtype=float)
    falling = Curve("steep", 2, 170 * 10.0**-x, np.full(5, 50.0), x, x, x, measure="test_loss")
    flat = Curve("flat", 2, np.full(5, 150.0), np.full(5, 50.0), x, x, x, measure="test_loss")
    axes = drawn([falling, flat]).axes[0]
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "test loss, log scale"
    assert 0 < low < 0.017
    assert high > 170
    heights = {name: text.get_position()[1] for name, text in names_at_ends(axes).items()}
    assert 0 <= heights["steep"] < 0.1
    assert heights["flat"] > 0.9
    assert drawn([flat]).axes[0].get_yscale() == "linear"


def test_the_last_point_has_a_marker_and_curves_that_coincide_have_theirs_apart():
    lines = drawn([synthetic("a", 90, points=101), synthetic("b", 90, points=101)]).axes[0].lines
    marks = [set(line.get_markevery()) for line in lines]
    assert marks[0] & marks[1] == {100}
    assert all(5 <= len(points) <= 9 for points in marks)


def test_a_model_that_was_never_trained_is_a_point(write_run, out):
    write_run("fedavg", 0, [0.1])
    assert len(drawn(curves(read_runs([out]))).axes[0].lines[0].get_xdata()) == 1


def test_the_file_is_a_picture_the_same_each_time_and_nothing_else_is_left(write_run, out):
    write_run("fedavg+server_adam", 0, [0.1, 0.5])
    path = plot_convergence([out], out, target=0.4)
    assert path == out / "convergence.png"
    first = path.read_bytes()
    assert plot_convergence([out], out / "again.png", target=0.4).read_bytes() == first
    assert {file.name for file in out.iterdir()} == {
        "again.png",
        "convergence.png",
        "fedavg+server_adam-seed0",
    }
    height, width, _ = mpl.image.imread(path).shape
    assert width == 2000
    assert 600 < height < 1000


@pytest.mark.parametrize("suffix", [".pdf", ".svg"])
def test_vector_formats(write_run, out, tmp_path, suffix):
    write_run("fedavg", 0, [0.1, 0.5])
    first = plot_convergence([out], tmp_path / f"a{suffix}").read_bytes()
    assert plot_convergence([out], tmp_path / f"b{suffix}").read_bytes() == first


def test_no_setting_outlives_a_figure_and_pyplot_is_not_used(write_run, out):
    write_run("fedavg", 0, [0.1, 0.5])
    before = dict(mpl.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    plot_convergence([out], out)
    assert dict(mpl.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_errors(write_run, out, tmp_path):
    write_run("fedavg", 0, [0.1, 0.5])
    with pytest.raises(InvalidOption, match=r"For 90 % write 0\.9"):
        plot_convergence([out], out, target=90)
    with pytest.raises(InvalidOption, match=r"For 95 % write 0\.95"):
        plot_convergence([out], out, confidence=95)
    with pytest.raises(InvalidOption, match=r"cannot draw to .*\.gif"):
        plot_convergence([out], out / "picture.gif")
    with pytest.raises(RecordError, match="does not exist"):
        plot_convergence([tmp_path / "nowhere"], out)
    with pytest.raises(RecordError, match=r"a\.png cannot be written"):
        plot_convergence([out], out / "fedavg-seed0" / "config.toml" / "a.png")


def test_without_matplotlib_the_error_says_what_to_install(write_run, out, monkeypatch):
    write_run("fedavg", 0, [0.1, 0.5])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RecordError, match=r'pip install "fedmerge\[sim\]"'):
        plot_convergence([out], out)
    assert not Path(out / "convergence.png").exists()
