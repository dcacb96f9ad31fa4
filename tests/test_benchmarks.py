"""The benchmarks run at the smallest size and write what they promise; their shared parts do what they say."""

import csv
import importlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from xml.etree import ElementTree

import pytest
import torch
from application import ROOT
from official_data import write_cifar10
from preloaded import python
from torch import nn

from lightning_easgd.callbacks import CurvatureMonitor

FOLDER = ROOT / "examples" / "benchmarks"
sys.path.insert(0, str(FOLDER))

from harness.counters import PeakMemory, bytes_sent  # noqa: E402
from harness.methods import NAMES, methods, why_missing  # noqa: E402
from harness.model import mlp  # noqa: E402
from harness.network import Link, NoNamespacesError, slow_network  # noqa: E402
from harness.ranks import RanksError, one_host, run_ranks  # noqa: E402
from harness.ratios import ratios  # noqa: E402
from harness.turns import Turn  # noqa: E402
from on_gpu.stalls import calls_of_steps  # noqa: E402

pytestmark = pytest.mark.timeout(170)

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def run(name, output, *arguments):
    """In this process, whose imports are there already."""
    importlib.import_module(name).main([*arguments, "--output", str(output)])


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_step_cost(tmp_path):
    size = ["--parameters", "20000", "--batch-size", "8", "--rounds", "1", "--steps", "4", "--tau", "2"]
    chosen = ["--methods", "easgd", "post_local_sgd", "ddp", "easgd int8", "raw_socket"]
    command = [python(), FOLDER / "run.py", "step_cost", *size, *chosen, "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=160, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    table = {row["method"]: row for row in rows(tmp_path / "step_cost.csv")}
    assert float(table["local"]["ratio"]) == 1
    gradients = 4 * sum(parameter.numel() for parameter in mlp(20000, 8).parameters())
    assert float(table["ddp"]["bytes_per_step"]) == pytest.approx(gradients, rel=0.05)
    assert float(table["post_local_sgd tau=2"]["bytes_per_step"]) == pytest.approx(gradients / 2, rel=0.05)
    assert float(table["raw_socket tau=2"]["bytes_per_step"]) == pytest.approx(gradients / 2, rel=0.05)
    assert float(table["local"]["bytes_per_step"]) < 0.01 * gradients
    assert float(table["easgd tau=2"]["ratio"]) > 0
    assert ("skipped: easgd int8: " in said) == ("easgd int8 tau=2" not in table)
    setting = json.loads((tmp_path / "setting.json").read_text())
    assert setting["versions"]["torch"]
    assert setting["hardware"]["cores"] == os.cpu_count()
    assert "--steps 4" in setting["command"]
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.processes
def test_straggler(tmp_path):
    run("straggler", tmp_path, "--ranks", "2", "--rounds", "1", "--steps", "2", "--tau", "2", "--parameters", "1000",
        "--sleep-ms", "30", "--methods", "easgd_async", "ddp")  # fmt: skip
    table = {(row["situation"], row["method"]): float(row["rate_of_undisturbed"])
             for row in rows(tmp_path / "straggler.csv")}  # fmt: skip
    assert len(table) == 9
    assert table["straggler", "ddp"] < 0.5


@pytest.mark.processes
def test_exchange(tmp_path):
    run("exchange", tmp_path, "--parameters", "300000", "--workers", "2", "--rounds", "2")
    table = {row["way"]: row for row in rows(tmp_path / "exchange.csv")}
    assert set(table) == {"memcpy", "memory", "raw socket", "sockets"}
    assert all(float(row["GB_per_s"]) > 0 for row in table.values())
    assert float(table["memcpy"]["of_limit"]) == float(table["raw socket"]["of_limit"]) == 1


def namespaces():
    """Fail the test for want of them only where they should be: as root, with iproute2."""
    try:
        with slow_network(1, Link(100)):
            pass
    except NoNamespacesError as error:
        pytest.skip(f"no network namespaces here: {error}")


@pytest.mark.processes
def test_slow_link_and_overview(tmp_path):
    namespaces()
    sizes = ["--parameters", "20000", "--rounds", "1", "--steps", "2", "--tau", "2", "--methods", "easgd", "ddp"]
    run("slow_link", tmp_path, *sizes, "--mbit", "50", "--tensors", "8", "--batch-size", "8", "--blocking-steps", "2")
    table = {row["method"]: row for row in rows(tmp_path / "slow_link.csv")}
    assert float(table["easgd tau=2"]["bytes_per_step"]) > 20000  # it went over the network
    assert float(table["ddp"]["link_load"]) > float(table["easgd tau=2"]["link_load"]) > 0
    (tmp_path / "step_cost.csv").write_text((tmp_path / "slow_link.csv").read_text())  # the same columns, and more
    picture = tmp_path / "overview.png"
    where = ["--fast", str(tmp_path), "--slow", str(tmp_path), "--mbit", "50", "--slow-tau", "2", "--fast-tau", "2"]
    where += ["--fast-batch-size", "8"]
    run("overview", picture, *where)
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize("delay_ms", [0, 20])
def test_slow_network_is_as_slow_as_asked(delay_ms):
    namespaces()
    megabytes = 2

    def talk(rank, place, send, places):
        if rank == 0:
            with socket.create_server((place.address, 5000)) as listener:
                connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for _ in range(5):
                    connection.sendall(connection.recv(1))
                while connection.recv(1 << 20):
                    pass
            return
        with connect(places[0].address) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            started = time.perf_counter()
            for _ in range(5):
                connection.sendall(b"x")
                connection.recv(1)
            answered = time.perf_counter()
            connection.sendall(bytes(megabytes * 1_000_000))
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
            send((answered - started, time.perf_counter() - answered))

    measured = []
    with slow_network(2, Link(50, delay_ms)) as places:
        run_ranks(talk, places, places, timeout=60, receive=measured.append)
    [(round_trips, transfer)] = measured
    assert round_trips > 0.9 * 5 * 2 * delay_ms / 1e3
    assert transfer > 0.8 * megabytes * 8 / 50


def connect(address):
    for _ in range(200):
        try:
            return socket.create_connection((address, 5000), timeout=30)
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise AssertionError("nobody listens")


def test_namespaces_are_gone_after_an_error():
    namespaces()

    def listed():
        return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout

    mine = f"easgd-benchmark-{os.getpid()}-"

    def fail():
        with slow_network(2, Link(100)):
            assert mine in listed()
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert mine not in listed()


def test_time_to_accuracy_without_data_says_so(tmp_path, capsys):
    run("time_to_accuracy", tmp_path, "--root", str(tmp_path))
    assert "skipped: " in capsys.readouterr().out


class DearMonitor(CurvatureMonitor):
    """One whose readings take as long as no noise of the machine does."""

    SECONDS = 0.2

    def on_train_batch_end(self, trainer, *rest):
        before = len(self.readings)
        super().on_train_batch_end(trainer, *rest)
        end = time.process_time() + self.SECONDS
        while len(self.readings) > before and time.process_time() < end:
            pass


@pytest.mark.processes
def test_monitor_cost(tmp_path, monkeypatch):
    module = importlib.import_module("monitor_cost")
    monkeypatch.setattr(module, "CurvatureMonitor", DearMonitor)
    run("monitor_cost", tmp_path, "--parameters", "20000", "--features", "32", "--batch-size", "8", "--rounds", "1",
        "--steps", "1", "--tau", "2", "--every-n-steps", "4", "--batches", "2", "--draws", "1",
        "--readings", "1")  # fmt: skip
    table = {row["method"].removesuffix(" tau=2"): row for row in rows(tmp_path / "monitor_cost.csv")}
    assert list(table)[:2] == ["easgd", "easgd again"]
    assert len(table) == len(rows(tmp_path / "rounds.csv")) == 7
    assert float(table["easgd"]["ratio"]) == float(table["easgd"]["cpu_ratio"]) == 1
    # The reading after every fourth step is in the counted steps of its own method, and in no other's.
    counted = {name: float(row["cpu_ms_per_step"]) for name, row in table.items()}
    assert counted.pop("CurvatureMonitor") > 1e3 * DearMonitor.SECONDS / 4 > 2 * statistics.median(counted.values())
    readings = {row["reading"]: row for row in rows(tmp_path / "readings.csv")}
    assert len(readings) == 5
    assert int(float(readings["CurvatureMonitor, first"]["products"])) > 1
    assert all(float(row["seconds"]) > 0 for row in readings.values())
    assert float(readings["CurvatureMonitor, later"]["seconds"]) > DearMonitor.SECONDS


@pytest.mark.processes
def test_worker_groups(tmp_path):
    run("worker_groups", tmp_path, "--parameters", "20000", "--batch-size", "8", "--rounds", "1", "--steps", "4",
        "--tau", "2")  # fmt: skip
    table = {row["method"]: row for row in rows(tmp_path / "worker_groups.csv")}
    assert list(table) == ["DDPInside", "easgd on DDPInside tau=2", "FSDPInside", "easgd on FSDPInside tau=2"]
    assert float(table["DDPInside"]["ratio"]) == float(table["FSDPInside"]["ratio"]) == 1


class TinyNet(nn.Module):
    """A residual network's stem and head."""

    def __init__(self, stem, num_classes):
        super().__init__()
        self.layers = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
        self.num_classes = num_classes

    def forward(self, images):
        return self.layers(images)


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:verify=False")
def test_batchnorm_statistics(tmp_path, monkeypatch):
    module = importlib.import_module("batchnorm_statistics")
    monkeypatch.setattr(module, "CIFAR10DataModule", partial(module.CIFAR10DataModule, verify=False))
    # What is compared are statistics, of any network that has some.
    monkeypatch.setattr(module, "ResNet18", TinyNet)
    write_cifar10(tmp_path / "data")
    size = ["--root", str(tmp_path / "data"), "--rounds", "1", "--tau", "1", "--batch-size", "4", "--test-images", "7"]

    def scores(output, *arguments):
        run("batchnorm_statistics", output, *size, *arguments, "--batches", "1", "2")
        found = rows(output / "batchnorm_statistics.csv")
        return {(row["step"], row["weights"], row["statistics"]): row for row in found}

    table = scores(tmp_path, "--steps", "4", "--every", "2", "--lr", "0")
    center = ("mean of workers", "recalibrated 1", "recalibrated 2", "rank 0")
    kinds = [*(("center", kind) for kind in center), ("worker_0", "own"), ("worker_1", "own")]
    assert list(table) == [(step, *kind) for step in "24" for kind in kinds]
    losses = {key: float(row["loss"]) for key, row in table.items()}
    for step in "24":
        # A learning rate of 0: all weights are the center's, and only the statistics differ.
        assert losses[step, "center", "rank 0"] == pytest.approx(losses[step, "worker_0", "own"], rel=1e-5)
        different = [losses[step, *kind] for kind in kinds if kind != ("worker_0", "own")]
        assert all(abs(a - b) > 1e-5 for number, a in enumerate(different) for b in different[:number])
    assert len(rows(tmp_path / "means.csv")) == len(table)
    assert {row["test_images"] for row in table.values()} == {"7"}
    # Looking in between changes nothing.
    often = scores(tmp_path / "often", "--steps", "3", "--every", "1")
    once = scores(tmp_path / "once", "--steps", "3", "--every", "3")
    assert once == {key: row for key, row in often.items() if key[0] == "3"}
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_batchnorm_statistics_without_data_says_so(tmp_path, capsys):
    run("batchnorm_statistics", tmp_path, "--root", str(tmp_path))
    assert "skipped: " in capsys.readouterr().out


def test_ratios_are_to_the_reference_asked_for():
    turns = [
        Turn(method, 0, [seconds], [seconds], [0.0], [0.0]) for method, seconds in (("easgd", 2.0), ("other", 3.0))
    ]
    assert [row["ratio"] for row in ratios({}, turns, reference="easgd")] == [1, 1.5]
    assert ratios({}, turns) == []


@pytest.mark.processes
def test_gpu_without_a_gpu_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    run("gpu", tmp_path)
    assert "no CUDA device" in capsys.readouterr().out


def gpu_check(output, parts, **environment):
    """The script's dry run: its exit status, what it says, and its summary by part."""
    command = ["bash", FOLDER / "gpu_check.sh", "--device", "cpu", "--parts", parts]
    own = {"PYTHON": python(), "OUT": str(output), "DATA": ""}
    # In that Python Hydra, which is a plugin too, has been imported before.
    own["PYTEST_ADDOPTS"] = "-W ignore::pytest.PytestAssertRewriteWarning"
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=450, check=False, env=os.environ | own | environment
    )
    summary = json.loads((output / "summary.json").read_text()) if (output / "summary.json").exists() else {}
    return done.returncode, done.stdout + done.stderr, summary


@pytest.mark.timeout(500)
def test_gpu_check(tmp_path):
    status, said, summary = gpu_check(tmp_path, "tests benchmark two_gpus stacked", WORKERS="0")
    assert status == 0, said
    assert summary["device"] == "cpu"
    assert [(part["part"], part["status"]) for part in summary["parts"]] == [
        ("tests", "0"), ("benchmark", "0"), ("two_gpus", "skipped"), ("stacked", "skipped")
    ]  # fmt: skip
    assert all(part["note"] for part in summary["parts"][2:])
    (suite,) = ElementTree.parse(tmp_path / "tests.xml").getroot()
    assert int(suite.get("tests")) > int(suite.get("skipped"))
    assert "needs two GPUs" in (tmp_path / "summary.txt").read_text()
    results = tmp_path / "benchmark"
    setting = json.loads((results / "setting.json").read_text())
    assert setting["failures"] == []
    assert setting["card"] == {} or setting["card"]["cuda"]
    moved = {row["way"]: (float(row["bytes_moved"]), float(row["of_copy"])) for row in rows(results / "bandwidth.csv")}
    assert moved["copy"] == (8, 1)
    assert moved["difference, pull and push, one flat tensor"][0] == 36
    memory = {row["method"]: float(row["formula_words"]) for row in rows(results / "memory.csv")}
    assert memory == {"local": 0, "easgd": 3, "easgd bfloat16": 4.25, "easgd int8": pytest.approx(3.635, abs=1e-3),
                      "easgd center on cpu": 0, "easgd_async": 1}  # fmt: skip
    stalls = [row for row in rows(results / "stalls.csv") if row["method"] == "easgd tau=2" and row["ranks"] == "1"]
    assert {row["thread"] for row in stalls} == {"training"}
    assert {row["ranks"] for row in rows(results / "step_cost.csv")} == {"1", "2"}
    assert len(rows(results / "step_cost.csv")) == 12


def test_gpu_check_goes_on_after_a_part_that_fails(tmp_path):
    status, _, summary = gpu_check(tmp_path, "benchmark two_gpus", LIMIT_BENCHMARK="1")
    assert status == 1
    cut_off, skipped = summary["parts"]
    assert (cut_off["status"], skipped["status"]) == ("124", "skipped")
    assert "limit of 1 s" in cut_off["note"]


def test_gpu_check_refuses_what_it_does_not_know(tmp_path):
    status, said, summary = gpu_check(tmp_path, "nothing")
    assert (status, summary) == (2, {})
    assert "no part nothing" in said


@pytest.mark.processes
def test_gpu_leaves_out_rounds_that_do_not_fit(tmp_path):
    run("gpu", tmp_path, "--device", "cpu", "--parts", "step_cost", "--limit", "0", "--rounds", "3", "--tau", "2",
        "--steps", "2", "--batch-size", "2")  # fmt: skip
    assert {row["round"] for row in rows(tmp_path / "rounds.csv")} == {"0"}


def test_blocking_calls_are_those_of_their_step_and_thread():
    def event(name, ts, category="cpu_op", thread=7, duration=1, **arguments):
        return {"ph": "X", "name": name, "cat": category, "ts": ts, "dur": duration, "tid": thread, "args": arguments}

    trace = {
        "traceEvents": [
            {"ph": "M", "name": "process_name"},
            event("step of the benchmark 3", 0, "user_annotation", duration=100),
            event("step of the benchmark 4", 200, "user_annotation", duration=100),
            event("aten::item", 10),
            event("aten::add", 11),
            event("cudaStreamSynchronize", 50, "cuda_runtime", duration=2000),
            event("cudaStreamSynchronize", 60, "cuda_runtime"),
            event("cudaStreamSynchronize", 150, "cuda_runtime"),  # between the steps
            event("cudaEventSynchronize", 210, "cuda_runtime", thread=8),
            event("cudaMemcpyAsync", 220, "cuda_runtime", correlation=1),
            event("cudaMemcpyAsync", 230, "cuda_runtime", correlation=2),
            event("Memcpy DtoH (Device -> Pageable)", 900, "gpu_memcpy", thread=0, correlation=1),
            event("Memcpy DtoH (Device -> Pinned)", 901, "gpu_memcpy", thread=0, correlation=2),
        ]
    }
    assert calls_of_steps(trace) == {
        ("aten::item", True): {3: (1, 0.001)},
        ("cudaStreamSynchronize", True): {3: (2, 2.001)},
        ("cudaEventSynchronize", False): {4: (1, 0.001)},
        ("copy Memcpy DtoH (Device -> Pageable)", True): {4: (1, 0.001)},
    }


def test_every_benchmark_has_help():
    listed = subprocess.run([sys.executable, FOLDER / "run.py"], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^    (\w+)  ", listed, re.MULTILINE)
    assert {f"{name}.py" for name in names} | {"run.py"} == {path.name for path in FOLDER.glob("*.py")}


def test_ranks_that_fail_or_hang_are_named():
    def fail(rank, place, send):
        if rank == 1:
            raise ValueError("this rank")
        time.sleep(60)

    with pytest.raises(RanksError, match=r"(?s)rank 1 failed.*this rank"):
        run_ranks(fail, one_host(2), timeout=50, receive=print)

    def die(rank, place, send):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(RanksError, match="rank 1 died"):
        run_ranks(die, one_host(2), timeout=50, receive=print)

    def hang(rank, place, send):
        time.sleep(60 if rank == 0 else 0)

    with pytest.raises(RanksError, match=r"ranks \[0\] were still running"):
        run_ranks(hang, one_host(2), timeout=1, receive=print)


def test_ratios_are_to_the_local_training_of_the_same_round():
    def turn(method, number, seconds):
        return Turn(method, number, [seconds, seconds], [1.0, 1.0], [8.0, 24.0], [1e6, 3e6])

    turns = [
        turn("local", 0, 1.0),
        turn("ddp", 0, 3.0),
        turn("local", 1, 2.0),
        turn("ddp", 1, 4.0),
        turn("ddp", 2, 9.0),
    ]
    local, ddp = ratios({"ranks": 2}, turns)
    assert (local["ratio"], local["ratio_min"], local["ratio_max"]) == (1, 1, 1)
    assert (ddp["ratio"], ddp["ratio_min"], ddp["ratio_max"]) == (2.5, 2, 3)
    assert (ddp["ms_per_step"], ddp["bytes_per_step"], ddp["peak_MB"]) == (3500, 24, 3)


def test_counted_steps_are_whole_periods():
    for method in methods([name for name in NAMES if why_missing(name) is None], [4]):
        skip, count = method.window(10, warm_up=3)
        assert (skip, count) == ((9, 12) if method.tau else (3, 10))


@needs_linux
def test_peak_memory_sees_what_was_freed():
    block = b"1" * 200_000_000  # before it begins
    del block
    memory = PeakMemory()
    block = b"1" * 50_000_000  # written to, hence resident
    del block
    assert 45e6 < memory.bytes() < 80e6  # the kernel counts its pages in batches


@needs_linux
def test_sent_bytes_are_the_kernels():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as one,
        listener.accept()[0] as other,
    ):
        before = bytes_sent()
        one.sendall(bytes(10_000))
        other.recv(10_000, socket.MSG_WAITALL)
        assert bytes_sent() - before == 10_000


@pytest.mark.parametrize("tensors", [8, 150])
def test_models_have_the_size_and_the_tensors_asked_for(tensors):
    parameters = [parameter.numel() for parameter in mlp(1_000_000, tensors).parameters()]
    assert len(parameters) == tensors
    assert sum(parameters) == pytest.approx(1_000_000, rel=0.05)
