"""Run a benchmark, and write its results directory: tables, figure, versions, hardware.

python examples/benchmarks/run.py NAME [--help | options]
"""

import importlib
import os
import sys
import time

STARTED = time.perf_counter()  # before torch is imported, which a benchmark with a limit of seconds counts, too

os.environ.setdefault("OMP_NUM_THREADS", "1")

BENCHMARKS = {
    "step_cost": "what a training step costs: EASGD, DDP and peers against local training, on one host",
    "slow_link": "the same between nodes, over a slow network (needs root)",
    "straggler": "how fast the others are beside a slow worker, and with random pauses",
    "exchange": "bytes per second of an asynchronous exchange against memcpy and a raw socket",
    "time_to_accuracy": "seconds to a test error on CIFAR-10 over a slow network (needs root and the data set)",
    "gpu": "the exchange against the memory's bandwidth, and step cost on ResNet-50 (needs a GPU)",
    "monitor_cost": "what the callbacks cost in a training step, and what a reading of theirs takes",
    "batchnorm_statistics": "test error with BatchNorm's statistics from various sources (needs CIFAR-10)",
    "data_loading": "images per second of the loaders (prints only)",
    "simulated_time": "how well easgd-simulate predicts the time of real runs",
    "simulated_curve": "the error curves of real runs on the digits beside simulated ones",
    "stacked": "the paper's figure in steps: all workers of all methods stacked on one device (needs CIFAR-10, a GPU)",
    "outer_rules": "test error of rules of the center after equal steps, rates tuned for each (needs CIFAR-10)",
    "worker_groups": "what elastic averaging adds to a step where a worker is several ranks (DDP or FSDP2 inside)",
    "membership_cost": "what a step costs where workers may come and go, and nobody does",
    "membership": "workers killed, frozen, started again and added at random, beside a job left in peace",
    "overview": "draw the figure of step_cost and slow_link together",
    "figure": "draw the figure of a results directory again, from its tables",
}


def main() -> None:
    """Call the benchmark that is named."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, BENCHMARKS))
        print(__doc__, *(f"    {known:<{width}}  {what}" for known, what in BENCHMARKS.items()), sep="\n")
        return
    if name not in BENCHMARKS:
        sys.exit(f"run.py {name}: there is no such benchmark; choose one of {', '.join(BENCHMARKS)}")
    sys.argv[:2] = [f"{sys.argv[0]} {name}"]
    importlib.import_module(name).main()


if __name__ == "__main__":
    main()
