"""Divide the rows of a data set with the partitioners of flwr-datasets.

They work on a table, here of row numbers and labels only: images in it would cost seconds and gigabytes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.data.class_groups import ClassGroups
from fedmerge.data.extras import need
from fedmerge.data.partition_settings import PartitionSettings
from fedmerge.errors import PartitionError
from fedmerge.registry import entry, register

__all__ = ["REMEDIES", "assign_rows", "remedy_of"]

Rows = NDArray[np.int64]

REMEDIES = {
    "iid": "Use fewer clients or a smaller min_examples.",
    "dirichlet": "Use a larger alpha, fewer clients, a smaller min_examples or another seed.",
    "pathological": "Use fewer clients, another classes_per_client, a smaller min_examples or another seed.",
    "shard": "Use fewer clients, a smaller shards_per_client or a smaller min_examples.",
    "quantity": "Use fewer clients or a smaller min_examples.",
    "by_class_groups": "Use fewer clients, other groups, a smaller min_examples or a smaller held_out.",
    "natural": "Use fewer clients (the first ones of the data set), a smaller min_examples or a smaller held_out.",
    "column": "Use fewer clients (the first values of the column), a smaller min_examples or a smaller held_out.",
}


def remedy_of(scheme: str) -> str:
    """What to change where a division leaves a client with too little.

    Examples
    --------
    >>> remedy_of("mine:divide")
    'Have mine:divide give each client more rows, or use a smaller min_examples or a smaller held_out.'
    """
    own = f"Have {scheme} give each client more rows, or use a smaller min_examples or a smaller held_out."
    return REMEDIES.get(scheme, own)


def assign_rows(
    examples: int, key: Tensor | None, settings: PartitionSettings, clients: int, generator: np.random.Generator
) -> list[Rows]:
    """Give each client its rows.

    Parameters
    ----------
    examples : int
        Number of rows to divide.
    key : Tensor or None
        int64 `[examples]`: what the scheme divides by, which is the label, the natural client, or nothing.
    settings : PartitionSettings
        The scheme and its options.
    clients : int
        Number of clients to return.
    generator : numpy.random.Generator
        Source of every random choice.

    Returns
    -------
    list of numpy.ndarray
        For each client int64 row numbers; may be empty.

    Raises
    ------
    PartitionError
        Where the partitioner cannot do as the settings ask.
    DataError
        Where flwr-datasets is not installed.

    Examples
    --------
    >>> settings = PartitionSettings("iid", clients=3)
    >>> parts = assign_rows(7, None, settings, 3, np.random.default_rng(0))
    >>> sorted(len(part) for part in parts)
    [2, 2, 3]
    """
    flower = need("flwr_datasets.partitioner", "a partition")
    datasets = need("datasets", "a partition")
    # Not every partitioner shuffles: in a shuffled table, even a contiguous block is a random choice.
    order = generator.permutation(examples)
    columns = {"row": order} if key is None else {"row": order, "key": key.cpu().numpy()[order]}
    with _quiet(datasets):
        try:
            partitioner = _partitioner(flower, settings, clients, examples, generator)
            # As Arrow, a column is read in one go; by default it is read element by element.
            partitioner.dataset = datasets.Dataset.from_dict(columns).with_format("arrow")
            partitions = partitioner.num_partitions
            by_key = settings.scheme in ("natural", "column")
            positions = _natural_positions(partitioner) if by_key else range(partitions)
            parts = {
                client: _rows(partitioner.load_partition(position))
                for position, client in enumerate(positions)
                if client < clients
            }
        except ValueError as error:
            raise PartitionError(
                f"{settings}: found no division that gives each of the {clients} clients at least "
                f"min_examples={settings.min_examples} for training ({str(error).rstrip('.')}). "
                f"{remedy_of(settings.scheme)}"
            ) from error
    return [parts.get(client, np.empty(0, dtype=np.int64)) for client in range(clients)]


class _Asked(NamedTuple):
    """What every scheme is told besides its own options."""

    flower: Any
    clients: int
    examples: int
    fewest: int
    generator: np.random.Generator
    seed: int


def _partitioner(
    flower: Any, settings: PartitionSettings, clients: int, examples: int, generator: np.random.Generator
) -> Any:
    asked = _Asked(flower, clients, examples, settings.fewest_rows, generator, int(generator.integers(2**31)))
    scheme = entry("partition", settings.scheme)
    return scheme.cls(asked, **{name: getattr(settings, name) for name in scheme.options})


@register("iid", kind="partition")
def _iid(asked: _Asked) -> Any:
    """Equal parts, at random."""
    return asked.flower.IidPartitioner(asked.clients)


@register("dirichlet", kind="partition", paper="arXiv:1905.12022")
def _dirichlet(asked: _Asked, alpha: float = 0.3) -> Any:
    """Clients' shares of each class are a Dirichlet draw."""
    return asked.flower.DirichletPartitioner(
        asked.clients,
        "key",
        alpha=float(alpha),
        min_partition_size=asked.fewest,
        self_balancing=False,
        seed=asked.seed,
    )


@register("pathological", kind="partition", paper="arXiv:2102.02079")
def _pathological(asked: _Asked, classes_per_client: int = 2) -> Any:
    """A few classes at each client."""
    return asked.flower.PathologicalPartitioner(
        asked.clients,
        "key",
        num_classes_per_partition=classes_per_client,
        class_assignment_mode="first-deterministic",
        seed=asked.seed,
    )


@register("shard", kind="partition", paper="arXiv:1602.05629")
def _shard(asked: _Asked, shards_per_client: int = 2) -> Any:
    """Examples sorted by class and cut into equal shards, dealt at random."""
    return asked.flower.ShardPartitioner(
        asked.clients, "key", num_shards_per_partition=shards_per_client, seed=asked.seed
    )


@register("quantity", kind="partition")
def _quantity(asked: _Asked, alpha: float = 0.3) -> Any:
    """Classes at random, sizes by a Dirichlet draw."""
    return asked.flower.SizePartitioner(_sizes(asked, alpha))


@register("by_class_groups", kind="partition")
def _by_class_groups(asked: _Asked, groups: int | tuple[tuple[int, ...], ...] | None = None) -> Any:
    """Disjoint groups of classes, one at each client."""
    return ClassGroups(asked.clients, groups)


@register("natural", kind="partition")
def _natural(asked: _Asked) -> Any:
    """The clients that the data set itself names."""
    return asked.flower.NaturalIdPartitioner("key")


@register("column", kind="partition")
def _column(asked: _Asked, column: str = "") -> Any:
    """A client for each value of a column."""
    return asked.flower.NaturalIdPartitioner("key")


def _sizes(asked: _Asked, alpha: float) -> list[int]:
    """Sizes that add up to `examples`: the smallest allowed for each client, and a Dirichlet share of the rest."""
    examples, clients, fewest = asked.examples, asked.clients, asked.fewest
    spare = examples - clients * fewest
    if spare < 0:
        raise ValueError(f"{examples} examples are too few for {fewest} at each of {clients} clients.")
    shares = asked.generator.dirichlet(np.full(clients, float(alpha)))
    ends = np.rint(np.cumsum(shares) / shares.sum() * spare).astype(np.int64)
    return [fewest + int(size) for size in np.diff(ends, prepend=0)]


def _natural_positions(partitioner: Any) -> list[int]:
    """The natural client of each partition; a client without rows has none."""
    names: dict[int, int] = partitioner.partition_id_to_natural_id
    return [names[position] for position in range(len(names))]


def _rows(part: Any) -> Rows:
    rows: Rows = part[:]["row"].to_numpy()
    return rows


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Silence progress bars, logs and warnings: what matters of them comes back as an error."""
    showed_bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if showed_bars:
            datasets.enable_progress_bars()
