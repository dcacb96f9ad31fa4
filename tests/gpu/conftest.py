"""The marks of the GPU tests, in one place, and what they are skipped for."""

import fcntl
import os
import tempfile
from pathlib import Path

import pytest
import torch
from devices import count_cuda_devices, on_gpu

FOLDER = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before the selection by marks
def pytest_collection_modifyitems(items):
    here = [item for item in items if FOLDER in item.path.parents]
    if not here:
        return
    missing = on_gpu() and count_cuda_devices() == 0
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(180))
        if on_gpu():  # what CUDA, Triton and the compiler warn of changes from release to release
            item.add_marker(pytest.mark.filterwarnings("default"))
        if missing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_logreport(report):
    """Write a failure at once: of a run that is ended at its limit pytest says nothing more."""
    path = os.environ.get("EASGD_GPU_FAILURES")
    if path and report.failed:
        with Path(path).open("a") as file:
            file.write(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n\n")


@pytest.fixture
def cuda():
    """For tests that make no sense on the CPU."""
    if not on_gpu():
        pytest.skip("a dry run on the CPU has no CUDA device")


@pytest.fixture
def nccl(cuda, request):
    """One test of several ranks at a time: on one GPU their kernels wait for each other, and hold up all others'."""
    if not torch.distributed.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    if hasattr(request.node, "callspec") and request.node.callspec.params.get("ranks") == 1:
        yield
        return
    with Path(tempfile.gettempdir(), f"easgd-test-nccl-{os.getuid()}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def two_cuda_devices(cuda):
    if count_cuda_devices() < 2:
        pytest.skip("needs two CUDA devices")
