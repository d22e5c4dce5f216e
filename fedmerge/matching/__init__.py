"""Solvers that pair the neurons of different models."""
