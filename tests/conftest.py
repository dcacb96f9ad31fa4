"""One thread per process: the tests start several processes on few cores. And where the GPU tests run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ranks are forked: looking for a GPU must not initialise CUDA here.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=["cuda", "cpu"],
        default=os.environ.get("EASGD_GPU_TESTS", "cuda"),
        help="where tests/gpu runs: on a CUDA device, or a dry run on the CPU (also EASGD_GPU_TESTS=cpu)",
    )


def pytest_configure(config):
    os.environ["EASGD_GPU_TESTS"] = config.getoption("--device")
