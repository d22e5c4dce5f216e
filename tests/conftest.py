"""Settings for every test: quiet Flower, one thread, here and in every process that a test starts."""

import os

# Before anything imports Flower or Ray: no telemetry, no installation, no usage report.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Two tests run at once, and threads that wait for each other on two cores take as long again.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import torch

torch.set_num_threads(1)
