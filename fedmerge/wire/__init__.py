"""Tensors, statistics and questions as Flower records, and back: no mathematics."""
