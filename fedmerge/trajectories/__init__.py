"""Trajectories: averages over rounds of a method's global models. One file each."""

from fedmerge.trajectories.ema import Ema
from fedmerge.trajectories.lawa import Lawa
from fedmerge.trajectories.swa import Swa
from fedmerge.trajectories.swad import Swad
from fedmerge.trajectories.trajectory import Trajectory, TrajectoryContext
from fedmerge.trajectories.wise_ft import Paint, WiseFt

__all__ = ["Ema", "Lawa", "Paint", "Swa", "Swad", "Trajectory", "TrajectoryContext", "WiseFt"]
