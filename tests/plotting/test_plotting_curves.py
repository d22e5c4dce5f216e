from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from scipy import stats

from fedmerge.errors import InvalidOption, RecordError
from fedmerge.plotting import read_runs
from fedmerge.plotting.curves import Curve, accuracy_limits, curves, half_width


def flat(accuracy: float, width: float | None = None) -> Curve:
    ones = np.ones(3)
    return Curve("m", 3, accuracy * ones, None if width is None else width * ones, ones, ones, ones)


def test_means_and_running_totals_by_hand(write_run, out):
    write_run("fedavg", 0, [0.1, 0.4, 0.6])
    write_run("fedavg", 1, [0.1, 0.6, 0.8], bytes_up=3_000_000, bytes_down=0, seconds_train=1.0, seconds_merge=0.0)
    (curve,) = curves(read_runs([out]))
    assert (curve.method, curve.seeds) == ("fedavg", 2)
    assert curve.accuracy == pytest.approx([10, 50, 70])
    assert curve.rounds == pytest.approx([0, 1, 2])
    # Seed 0 sends 0, 3, 6 MB in 0, 3.5, 7 s; seed 1 sends 3, 6, 9 MB in 1, 2, 3 s.
    assert curve.megabytes == pytest.approx([1.5, 4.5, 7.5])
    assert curve.seconds == pytest.approx([0.5, 2.75, 5.0])


def test_the_band_is_students_interval(write_run, out):
    for seed, accuracy in enumerate((0.5, 0.6, 0.9)):
        write_run("fedavg", seed, [0.1, accuracy])
    (curve,) = curves(read_runs([out]), confidence=0.95)
    s = np.std([50, 60, 90], ddof=1)
    assert curve.half_width == pytest.approx([0, 4.302652729749464 * s / sqrt(3)])
    (curve,) = curves(read_runs([out]), confidence=0.9)
    assert curve.half_width == pytest.approx([0, stats.t.ppf(0.95, df=2) * s / sqrt(3)])


def test_one_seed_has_no_band(write_run, out):
    write_run("fedavg", 0, [0.1, 0.4])
    assert curves(read_runs([out]))[0].half_width is None
    assert half_width(np.ones((1, 5)), 0.95) is None


def test_unevaluated_rounds_are_no_points_but_their_costs_count(write_run, out):
    write_run("fedavg", 0, [0.1, None, 0.6])
    (curve,) = curves(read_runs([out]))
    assert curve.rounds == pytest.approx([0, 2])
    assert curve.megabytes == pytest.approx([0, 6])


def test_a_curve_ends_with_its_shortest_seed(write_run, out):
    write_run("fedavg", 0, [0.1, 0.4, 0.6])
    write_run("fedavg", 1, [0.1, 0.6])
    assert curves(read_runs([out]))[0].rounds == pytest.approx([0, 1])


def test_best_final_accuracy_comes_first(write_run, out):
    for method, final in (("a", 0.2), ("b", 0.9), ("c", 0.2)):
        write_run(method, 0, [0.1, final])
    assert [curve.method for curve in curves(read_runs([out]))] == ["b", "a", "c"]


def test_no_common_round_is_an_error(write_run, out):
    write_run("fedavg", 0, [None, 0.4])
    write_run("fedavg", 1, [0.1, None])
    with pytest.raises(RecordError, match=r"fedavg: no round was evaluated with every seed \(0, 1\)"):
        curves(read_runs([out]))


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_confidence_outside_its_range(write_run, out, confidence):
    write_run("fedavg", 0, [0.1])
    with pytest.raises(InvalidOption, match=r"For 95 % write 0\.95"):
        curves(read_runs([out]), confidence)


def test_limits_hold_every_mean_and_the_target():
    low, high = accuracy_limits([flat(10), flat(90)], target=0.95)
    assert 0 < low < 10
    assert 95 < high < 100


def test_a_band_widens_the_limits_only_so_far():
    narrow = accuracy_limits([flat(40, 2.0), flat(60)], target=None)
    assert narrow == pytest.approx((38 - 0.8, 60.8))
    wide = accuracy_limits([flat(40, 80.0), flat(60)], target=None)
    assert wide == pytest.approx((40 - 3 - 0.8, 63.8))


def test_a_single_flat_curve_has_room():
    low, high = accuracy_limits([flat(50)], target=None)
    assert low < 50 < high
