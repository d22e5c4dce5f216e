"""The 1,797 handwritten digits that ship with scikit-learn: the data set that needs no download."""

from __future__ import annotations

from pathlib import Path

import torch

from fedmerge.data.dataset import Dataset
from fedmerge.data.extras import need
from fedmerge.registry import register

__all__ = ["load_digits"]

_MEAN, _STD = 0.3053, 0.3760  # of all pixels, once divided by 16
_SPLIT_SEED = 0


@register("digits", kind="data set")
def load_digits(data_dir: Path) -> Dataset:
    """Load 8 x 8 digits `[n, 1, 8, 8]`: 1,437 to train and 360 to test, split by class with a fixed seed.

    Parameters
    ----------
    data_dir : Path
        Not used: the images come with scikit-learn.

    Raises
    ------
    DataError
        Where scikit-learn is not installed.

    Examples
    --------
    >>> load_digits(Path()).train_x.shape
    torch.Size([1437, 1, 8, 8])
    """
    source = need("sklearn.datasets", "data set 'digits'").load_digits()
    split = need("sklearn.model_selection", "data set 'digits'").train_test_split
    x = ((torch.from_numpy(source.images) / 16 - _MEAN) / _STD).to(torch.float32).unsqueeze(1)
    y = torch.from_numpy(source.target).to(torch.int64)
    train, test = split(torch.arange(len(y)).numpy(), test_size=0.2, stratify=y, random_state=_SPLIT_SEED)
    return Dataset(
        name="digits",
        train_x=x[train],
        train_y=y[train],
        test_x=x[test],
        test_y=y[test],
        num_classes=10,
        class_names=tuple("0123456789"),
    )
