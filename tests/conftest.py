"""Settings for every test: quiet Flower, one thread."""

import os

# Before anything imports Flower or Ray: no telemetry, no installation, no usage report.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import torch

torch.set_num_threads(1)
