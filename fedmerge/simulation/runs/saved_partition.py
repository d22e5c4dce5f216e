"""Who holds which examples: saved and drawn."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fedmerge.plotting import plot_partition
from fedmerge.records.run_records import write_tensors
from fedmerge.simulation.runs.config_model import Config
from fedmerge.simulation.runs.experiment import Experiment

__all__ = ["save_partition"]


def save_partition(config: Config, seed: int, out: Path) -> tuple[Tensor, tuple[str, ...], list[Path]]:
    """Divide the data for one seed, save the division and draw it.

    Returns
    -------
    tuple
        Training examples by client and class, int64 [clients, classes], or by client alone, [clients, 1], where
        an example has many labels; the clients' names; the files.
    """
    experiment = Experiment(config, seed)
    dataset, partition = experiment.dataset, experiment.partition
    labels = dataset.known_labels if dataset.num_classes else None
    one_label = labels is not None and labels.ndim == 1
    if labels is not None and one_label:
        counts = partition.label_counts(labels, dataset.num_classes)
    else:
        counts = torch.tensor([[len(rows)] for rows in partition.train])
    # Names that somebody gave, rather than numbers.
    named = config.partition.scheme in ("natural", "column") or config.partition.own
    suffix = "" if seed == config.seeds[0] else f"-seed{seed}"
    tensors = out / f"partition{suffix}.safetensors"
    write_tensors(tensors, partition.to_tensors())
    title = f"{dataset.name}, {config.partition.scheme}, seed {seed}"
    picture = plot_partition(
        counts.numpy(),
        out / f"partition{suffix}.png",
        class_names=dataset.class_names if one_label else (),
        client_names=partition.client_names if named else (),
        title=title,
    )
    return counts, partition.client_names, [tensors, picture]
