"""Callbacks of the comparisons: what a run is compared by, and the averages of the sequential baselines."""

from lightning_easgd.lab.recorders.iterate_average import IterateAverage
from lightning_easgd.lab.recorders.learning_curve import CURVE_FILE, LearningCurve

__all__ = ["CURVE_FILE", "IterateAverage", "LearningCurve"]
