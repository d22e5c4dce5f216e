"""Simulation: a Flower Grid of virtual clients, and comparisons that run on it."""

from fedmerge.simulation.grids.simulation_grid import SimulationGrid, make_workers
from fedmerge.simulation.runs.compare import compare
from fedmerge.simulation.runs.config import Config, load_config, make_config
from fedmerge.simulation.runs.experiment import Experiment

__all__ = ["Config", "Experiment", "SimulationGrid", "compare", "load_config", "make_config", "make_workers"]
