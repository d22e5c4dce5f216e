from __future__ import annotations

import torch

from fedmerge.data import load_dataset


def test_shapes_and_scale(digits):
    assert digits.train_x.shape == (1437, 1, 8, 8)
    assert digits.test_x.shape == (360, 1, 8, 8)
    assert digits.train_x.dtype == torch.float32
    assert digits.num_classes == len(digits.class_names) == 10
    assert abs(digits.train_x.mean()) < 0.01
    assert abs(digits.train_x.std() - 1) < 0.01


def test_split_keeps_the_class_shares(digits):
    train = torch.bincount(digits.train_y) / len(digits.train_y)
    test = torch.bincount(digits.test_y) / len(digits.test_y)
    torch.testing.assert_close(train, test, atol=0.003, rtol=0)


def test_train_and_test_are_all_the_images(digits):
    from sklearn.datasets import load_digits

    pixels = torch.cat([digits.train_x, digits.test_x]).flatten(1) * 0.3760 + 0.3053
    ours = sorted(map(tuple, (pixels * 16).round().int().tolist()))
    assert ours == sorted(map(tuple, load_digits().data.astype(int).tolist()))


def test_same_every_time(digits):
    again = load_dataset("digits")
    assert torch.equal(digits.train_x, again.train_x)
    assert torch.equal(digits.test_y, again.test_y)


def test_images_can_be_told_apart_by_class(digits):
    """A nearest-centroid guess is right nine times in ten: labels belong to their images."""
    centroids = torch.stack([digits.train_x[digits.train_y == k].mean(0).flatten() for k in range(10)])
    guess = torch.cdist(digits.test_x.flatten(1), centroids).argmin(1)
    assert (guess == digits.test_y).float().mean() > 0.85
