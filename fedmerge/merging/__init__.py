"""The road from client updates to the next global model, and how a method's name becomes one."""

from fedmerge.merging.build_pipeline import build_pipeline, parts_beside
from fedmerge.merging.method_order import divided, main_part, method_parts, options_elsewhere
from fedmerge.merging.pipeline import Pipeline
from fedmerge.merging.result import MergeResult

__all__ = [
    "MergeResult",
    "Pipeline",
    "build_pipeline",
    "divided",
    "main_part",
    "method_parts",
    "options_elsewhere",
    "parts_beside",
]
