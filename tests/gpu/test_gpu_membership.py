"""Workers that come and go, and share the first GPU: real processes, a real lighthouse, gloo and NCCL between them."""

import signal
from functools import partial
from importlib.util import find_spec

import pytest
from devices import device, on_gpu
from membership_job import HEARTBEAT, PATIENCE, SLACK, TRANSFER, Job, are

if find_spec("torchft") is None:  # not imported: it starts CUDA, and the ranks of other tests are forks of this process
    pytest.skip("needs torchft", allow_module_level=True)
pytestmark = pytest.mark.timeout(150)
LOST = {"gloo": TRANSFER, "nccl": 6.0}  # seconds; to make a communicator takes longer on a GPU that many share
between = pytest.mark.parametrize("process_group", ["gloo", "nccl"])


@pytest.fixture
def job(tmp_path, process_group):
    if process_group == "nccl" and not on_gpu():
        pytest.skip("NCCL needs a GPU")
    within = LOST[process_group]
    tolerance = {"quorum_timeout": PATIENCE, "process_group_timeout": within, "process_group": process_group}
    with Job(tmp_path) as job:
        job.start = partial(job.start, device=str(device()), tolerance=tolerance)
        yield job


def check_steps(job, number, since=0.0):
    """Whoever lives makes each of its steps once."""
    clocks = [line["clock"] for line in job.steps(number) if line["time"] > since]
    assert clocks == list(range(clocks[0], clocks[0] + len(clocks)))


@pytest.mark.parametrize(
    ("process_group", "wire_dtype", "dies_in"),
    [
        ("gloo", None, ["all_reduce", 10]),
        ("gloo", "int8", ["all_gather", 20]),
        ("nccl", None, ["_exchange", 10]),
        ("nccl", None, ["all_reduce", 10]),  # the others' kernel waits for it
    ],
)
def test_killed_inside_of_an_exchange_and_started_again(job, process_group, wire_dtype, dies_in):
    first = job.start(0, wire_dtype=wire_dtype)
    job.until(0, are(0))
    one = job.start(1, wire_dtype=wire_dtype, dies_in=dies_in)
    assert one.wait(60) == -signal.SIGKILL
    last = job.steps(1)[-1]
    alone = job.until(0, are(0), since=last["time"])
    assert job.stood_still(0, last["time"], alone["time"]) <= LOST[process_group] + SLACK

    job.start(1, wire_dtype=wire_dtype)
    again = job.until(1, are(0, 1), since=job.started_again(1))
    job.until(0, lambda line: line["version"] > again["version"] + 6, since=again["time"])
    job.signal(0, signal.SIGTERM)
    assert first.wait(30) == 0
    job.until(1, are(1), since=again["time"])
    job.check_centers(0, 1)
    check_steps(job, 0)


@between
@pytest.mark.dry
def test_killed_between_exchanges_frozen_and_late(job, process_group):
    for number in (0, 1):
        job.start(number)
    job.until(0, are(0, 1))
    killed = job.signal(1, signal.SIGKILL)
    alone = job.until(0, are(0), since=killed)
    assert job.stood_still(0, killed, alone["time"]) <= max(HEARTBEAT, LOST[process_group]) + SLACK

    for number in (1, 2):
        job.start(number)
    came = job.until(2, are(0, 1, 2), since=alone["time"])
    job.until(0, are(0, 1, 2), since=alone["time"])
    frozen = job.signal(1, signal.SIGSTOP)
    without = [job.until(number, are(0, 2), since=frozen) for number in (0, 2)]
    for number, line in zip((0, 2), without, strict=True):
        assert job.stood_still(number, frozen, line["time"]) <= LOST[process_group] + SLACK
    thawed = job.signal(1, signal.SIGCONT)
    again = job.until(1, are(0, 1, 2), since=thawed)
    job.until(0, lambda line: line["version"] > again["version"] + 3, since=again["time"])
    job.check_centers(0, 1, 2)
    for number, since in ((0, 0.0), (1, alone["time"]), (2, came["time"])):
        check_steps(job, number, since)


@pytest.mark.parametrize(("process_group", "wire_dtype"), [("gloo", None), ("gloo", "int8")])
def test_workers_of_two_ranks(job, process_group, wire_dtype):
    torchrun = "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"
    where = "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"
    for number in (0, 1):
        job.start(number, *torchrun, *where, ranks=2, wire_dtype=wire_dtype)
    for rank in ("0", "0.1", "1", "1.1"):
        job.until(rank, are(0, 1))
    job.until("1.1", lambda line: line["version"] > 8)
    job.signal("1.1", signal.SIGKILL)
    again = job.started_again(1)
    for rank in ("0", "0.1", "1", "1.1"):
        back = job.until(rank, are(0, 1), since=again)
        job.until(rank, lambda line, back=back: line["version"] > back["version"] + 6, since=again)
    for pair in (("0", "1"), ("0.1", "1.1"), ("0", "0.1")):
        job.check_centers(*pair)
    if wire_dtype is None:
        job.check_moves("0", "1", tau=5, beta=0.9, tolerance=1e-6)
