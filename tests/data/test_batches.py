from __future__ import annotations

import numpy as np
import pytest

from fedmerge.errors import InvalidOption
from fedmerge.seeding import batch_indices


def draw(n, batch_size, seed=0, **length):
    return list(batch_indices(n, batch_size, generator=np.random.default_rng(seed), **length))


def test_each_epoch_visits_every_example_once_in_a_new_order():
    batches = draw(10, 4, epochs=3)
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    epochs = [np.concatenate(batches[start : start + 3]) for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


def test_steps_go_on_over_epochs_and_are_exact():
    batches = draw(10, 4, steps=7)
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2, 4]
    assert sorted(np.concatenate(batches[3:6])) == list(range(10))


def test_steps_are_the_first_batches_of_the_epochs():
    for by_step, by_epoch in zip(draw(10, 3, steps=5), draw(10, 3, epochs=2), strict=False):
        np.testing.assert_array_equal(by_step, by_epoch)


def test_same_generator_state_gives_same_batches():
    for first, second in zip(draw(50, 8, epochs=2, seed=3), draw(50, 8, epochs=2, seed=3), strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(draw(50, 8, epochs=1, seed=3)[0], draw(50, 8, epochs=1, seed=4)[0])


def test_batch_larger_than_the_data_is_the_whole_epoch():
    assert [sorted(batch) for batch in draw(3, 100, epochs=2)] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("length", [{"epochs": 0}, {"steps": 0}])
def test_zero_length_draws_nothing(length):
    assert draw(5, 2, **length) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"n": 0, "batch_size": 2, "epochs": 1}, "n=0"),
        ({"n": 5, "batch_size": 0, "epochs": 1}, "batch_size=0"),
        ({"n": 5, "batch_size": 2}, "exactly one"),
        ({"n": 5, "batch_size": 2, "epochs": 1, "steps": 1}, "exactly one"),
        ({"n": 5, "batch_size": 2, "epochs": -1}, "epochs=-1"),
        ({"n": 5, "batch_size": 2, "steps": -3}, "steps=-3"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(arguments, named):
    with pytest.raises(InvalidOption, match=named):
        batch_indices(generator=np.random.default_rng(0), **arguments)
