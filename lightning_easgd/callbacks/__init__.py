"""Callbacks that watch a run through the strategy's public interface and write what they see to CSV files.

None of them runs a collective, or waits for an exchange in flight, while batches are trained. They gather
what the ranks have seen where all ranks meet anyway: at the end of a validation and at the end of training.
With strategies that have no center (DDP, one device, independent workers) they record what makes sense there.
"""

from lightning_easgd.callbacks.curvature_monitor import CurvatureMonitor, CurvatureReading
from lightning_easgd.callbacks.elastic_monitor import COMMUNICATION_FILE, ELASTIC_DIRECTORY, ElasticMonitor
from lightning_easgd.callbacks.local_energy_monitor import LOCAL_ENERGY_FILE, LocalEnergyMonitor
from lightning_easgd.callbacks.recording import ElasticStrategy, ddp_bytes, gather, write_csv
from lightning_easgd.callbacks.time_split import TIME_FILE, TimeSplit
from lightning_easgd.callbacks.worker_evaluation import ACCURACY_FILE, WorkerEvaluation, accuracy
from lightning_easgd.strategies.batchnorm import RecalibrateBatchNorm

__all__ = [
    "ACCURACY_FILE",
    "COMMUNICATION_FILE",
    "ELASTIC_DIRECTORY",
    "LOCAL_ENERGY_FILE",
    "TIME_FILE",
    "CurvatureMonitor",
    "CurvatureReading",
    "ElasticMonitor",
    "ElasticStrategy",
    "LocalEnergyMonitor",
    "RecalibrateBatchNorm",
    "TimeSplit",
    "WorkerEvaluation",
    "accuracy",
    "ddp_bytes",
    "gather",
    "write_csv",
]
