"""The marks of the GPU tests, in one place, and what they are skipped for."""

from pathlib import Path

import pytest
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


@pytest.fixture
def cuda():
    """For tests that make no sense on the CPU."""
    if not on_gpu():
        pytest.skip("a dry run on the CPU has no CUDA device")


@pytest.fixture
def two_cuda_devices(cuda):
    if count_cuda_devices() < 2:
        pytest.skip("needs two CUDA devices")
