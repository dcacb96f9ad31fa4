"""One thread per process: the tests start several processes on few cores. And where the GPU tests run.

Tests that start processes are marked `processes` here, by what they call; the others are `make test-fast`.
"""

import functools
import gc
import operator
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ranks are forked: looking for a GPU must not initialise CUDA here.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# torch asks a name server who each connection is from; one that does not answer would be waited for five seconds.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
# And warns, among what tests read of a process, when that does not know.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import pytest

# The tests' modules and libraries stay: to look for garbage among them takes a third of the time that they need to be
# imported, later a fifth of what a test of Hydra's needs, and copies memory that forked ranks share.
gc.disable()

HERE = str(Path(__file__).parent)
# What starts processes, and what code that does so itself calls it.
STARTERS = {"run_ranks", "end_ranks", "subprocess", "multiprocessing", "fork", "python", "Process"}
_started: list[str] | None = None  # by the test that runs; None if it may


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=["cuda", "cpu"],
        default=os.environ.get("EASGD_GPU_TESTS", "cuda"),
        help="where tests/gpu runs: on a CUDA device, or a dry run on the CPU (also EASGD_GPU_TESTS=cpu)",
    )


def pytest_configure(config):
    os.environ["EASGD_GPU_TESTS"] = config.getoption("--device")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs):
    from preloaded import python

    for spec in specs:  # each of them would import the same, and have a server of its own
        spec.python = shlex.quote(python())


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    known: dict[Any, bool] = {}
    for item in items:
        fixtures = [definition.func for each in item._fixtureinfo.name2fixturedefs.values() for definition in each]
        if any(_starts(function, known) for function in (item.obj, *fixtures)):
            item.add_marker("processes")


def pytest_collection_finish(session):
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # forked ranks too
    gc.enable()


def _starts(value: Any, known: dict[Any, bool]) -> bool:
    """Whether a function of the tests, or one that it uses, names one of the STARTERS."""
    if isinstance(value, MethodType):
        value = value.__func__
    value = getattr(value, "__wrapped__", value)
    if isinstance(value, type) and value.__module__ in sys.modules:
        if not _is_ours(sys.modules[value.__module__]):
            return False
        methods = [each for each in vars(value).values() if isinstance(each, FunctionType)]
        return any(_starts(method, known) for method in methods)
    if not isinstance(value, FunctionType) or not value.__code__.co_filename.startswith(HERE):
        return False
    if value not in known:
        known[value] = False  # while it is looked at
        names = set(_names(value.__code__))
        known[value] = not STARTERS.isdisjoint(names) or any(
            _starts(value.__globals__[name], known) for name in names & value.__globals__.keys()
        )
    return known[value]


def _is_ours(module: ModuleType) -> bool:
    return (getattr(module, "__file__", None) or "").startswith(HERE)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _note(start: str) -> None:
    if _started is not None:
        _started.append(start)


def _noted(init: FunctionType) -> Any:
    @functools.wraps(init)
    def noted(self: Any, args: Any, *rest: Any, **keywords: Any) -> None:
        _note(f"subprocess.Popen({args!r})")
        init(self, args, *rest, **keywords)

    return noted


# An audit hook would see both, and be called for all else that is audited, in ranks too: one percent of all time.
os.register_at_fork(before=lambda: _note("os.fork"))
subprocess.Popen.__init__ = _noted(subprocess.Popen.__init__)


@contextmanager
def _watched(item) -> Iterator[None]:
    """A test that starts a process without the mark fails: it would be in `make test-fast`."""
    global _started  # noqa: PLW0603
    _started = None if item.get_closest_marker("processes") else []
    try:
        yield
        assert not _started, f"mark this test `processes`: it starts some ({', '.join(_started)})"
    finally:
        _started = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    with _watched(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with _watched(item):
        return (yield)


# What a fit in the tests' own process leaves there, and forked ranks would take for theirs.
RANK = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
        "TORCHELASTIC_RUN_ID")  # fmt: skip


@pytest.fixture(autouse=True)
def _no_rank_stays() -> Iterator[None]:
    """And all tests draw the same numbers, whatever has run before them."""
    for library, seed in (("random", "seed"), ("numpy", "random.seed"), ("torch", "manual_seed")):
        if library in sys.modules:
            operator.attrgetter(seed)(sys.modules[library])(0)
    before = {name: os.environ.get(name) for name in RANK}
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
