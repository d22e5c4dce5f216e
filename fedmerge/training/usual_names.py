"""What Flower's templates and other programs call the settings of local training."""

from __future__ import annotations

__all__ = ["USUAL_NAMES"]

USUAL_NAMES = {
    "bs": "batch_size",
    "local_batch_size": "batch_size",
    "local_epochs": "epochs",
    "local_steps": "steps",
    "lr": "learning_rate",
    "mu": "proximal_mu",
    "num_epochs": "epochs",
    "wd": "weight_decay",
}
