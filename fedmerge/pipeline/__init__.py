"""The road from client updates to the next global model, and how a method's name becomes one."""

from fedmerge.pipeline.build import build_pipeline, method_parts
from fedmerge.pipeline.pipeline import Pipeline
from fedmerge.pipeline.result import MergeResult

__all__ = ["MergeResult", "Pipeline", "build_pipeline", "method_parts"]
