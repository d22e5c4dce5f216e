"""Who holds which examples: saved and drawn."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fedmerge.plotting import plot_partition
from fedmerge.records import write_tensors
from fedmerge.simulation.config import Config
from fedmerge.simulation.experiment import Experiment

__all__ = ["save_partition"]


def save_partition(config: Config, seed: int, out: Path) -> tuple[Tensor, tuple[str, ...], list[Path]]:
    """Divide the data for one seed, save the division and draw it.

    Returns
    -------
    tuple
        Training examples by client and class, int64 [clients, classes]; the clients' names; the files.
    """
    experiment = Experiment(config, seed)
    dataset, partition = experiment.dataset, experiment.partition
    counts = partition.label_counts(dataset.train_y, dataset.num_classes)
    suffix = "" if seed == config.seeds[0] else f"-seed{seed}"
    tensors = out / f"partition{suffix}.safetensors"
    write_tensors(tensors, partition.to_tensors())
    shown = counts if dataset.train_y.ndim == 1 else counts.sum(1, keepdim=True)
    title = f"{dataset.name}, {config.partition.scheme}, seed {seed}"
    picture = plot_partition(
        shown.numpy(),
        out / f"partition{suffix}.png",
        class_names=dataset.class_names if dataset.train_y.ndim == 1 else (),
        client_names=partition.client_names if dataset.client_names else (),
        title=title,
    )
    return counts, partition.client_names, [tensors, picture]
