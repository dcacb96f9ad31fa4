"""A simulator: hundreds of elastic averaging workers in one process, and the time that they would have taken.

Data flows one way. A :class:`Schedule` on a :class:`Cluster` yields :mod:`.events` in the order of simulated time: a
discrete-event simulation of steps, links, all-reduces and served centers (:mod:`.cluster`, :mod:`.schedules`,
:mod:`.served`) that knows nothing of vectors. A :class:`Learner` applies the events to all workers' vectors at once
(:mod:`.workers`, :mod:`.learning`) with the equations of :mod:`lightning_easgd.method.elastic`, and knows nothing of
seconds. :func:`simulate` puts the two together: the error of the center against time, on a :class:`Problem`.
:mod:`.simulate_command` is ``easgd-simulate``.
"""

from lightning_easgd.lab.simulation.cluster import Cluster, Link, Stall
from lightning_easgd.lab.simulation.learning import Learner
from lightning_easgd.lab.simulation.problems import Gradients, Problem, Quadratic, spectrum
from lightning_easgd.lab.simulation.schedules import Schedule, SynchronousSchedule
from lightning_easgd.lab.simulation.served import AsynchronousSchedule, RoundRobinSchedule, TreeSchedule
from lightning_easgd.lab.simulation.simulator import SimulatedRun, Timing, simulate, time_run
from lightning_easgd.lab.simulation.workers import LocalSGD

__all__ = [
    "AsynchronousSchedule",
    "Cluster",
    "Gradients",
    "Learner",
    "Link",
    "LocalSGD",
    "Problem",
    "Quadratic",
    "RoundRobinSchedule",
    "Schedule",
    "SimulatedRun",
    "Stall",
    "SynchronousSchedule",
    "Timing",
    "TreeSchedule",
    "simulate",
    "spectrum",
    "time_run",
]
