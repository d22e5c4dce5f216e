"""The models that a federation can train: build one by name, or bring your own as ``module:factory``."""

from __future__ import annotations

from fedmerge.models.build import build_model, model_names, model_options

__all__ = ["build_model", "model_names", "model_options"]
