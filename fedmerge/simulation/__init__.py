"""Simulation: a Flower Grid of virtual clients, and comparisons that run on it."""

from fedmerge.simulation.compare import compare
from fedmerge.simulation.config import Config, load_config, make_config
from fedmerge.simulation.experiment import Experiment
from fedmerge.simulation.grid import SimulationGrid, make_workers

__all__ = ["Config", "Experiment", "SimulationGrid", "compare", "load_config", "make_config", "make_workers"]
