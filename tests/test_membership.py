"""Workers that are killed, frozen, started again and late: real processes, and a real lighthouse."""

import signal
import time

import pytest
from membership_job import HEARTBEAT, PATIENCE, SLACK, TRANSFER, Job, are

pytestmark = pytest.mark.timeout(170)
pytest.importorskip("torchft")


def torchrun(ranks, restarts=1):
    where = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--monitor-interval=0.1")
    return "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", *where


@pytest.fixture
def job(tmp_path):
    with Job(tmp_path) as job:
        yield job


@pytest.mark.serial
def test_killed_started_again_late_and_frozen(job):
    job.start(0)
    one = job.start(1)
    job.until(0, are(0, 1))

    killed = job.signal(1, signal.SIGKILL)  # between exchanges, or in one
    one.wait(20)
    alone = job.until(0, are(0), since=killed)
    assert job.stood_still(0, killed, alone["time"]) <= HEARTBEAT + SLACK

    second = job.start(0)  # of the same number
    assert second.wait(60) != 0
    assert "a worker with replica_id=0 is alive already" in job.said(0)

    job.start(1)
    back = job.until(1, are(0, 1), since=alone["time"])
    others = job.until(0, lambda line: line["time"] >= back["time"])
    came = [line for line in job.lines(1) if line.get("event") == "starts"][-1]["time"]
    meanwhile = [line["clock"] for line in job.steps(0) if line["time"] < came][-1]
    assert meanwhile <= back["clock"] <= others["clock"] + 5
    assert back["step"] == back["clock"]
    assert (back["clock"] - 15) // 40 <= back["epoch"] <= back["clock"] // 40  # as it was when the center was sent
    assert back["lr"] == pytest.approx(0.05 * 0.99 ** (back["step"] // 10))
    assert meanwhile <= back["tracked"] <= others["clock"] + 5  # with the buffers of one that lives
    assert back["time"] - came <= 2.0 + job.slowness(0)

    job.start(2)
    job.until(2, are(0, 1, 2))
    job.until(0, are(0, 1, 2))

    frozen = job.signal(1, signal.SIGSTOP)
    without = job.until(0, are(0, 2), since=frozen)
    assert job.stood_still(0, frozen, without["time"]) <= TRANSFER + SLACK
    assert job.stood_still(2, frozen, without["time"]) <= TRANSFER + SLACK
    thawed = job.signal(1, signal.SIGCONT)
    again = job.until(1, are(0, 1, 2), since=thawed)
    kept = [line for line in job.steps(1) if line["time"] < frozen + 0.1][-1]
    assert abs(again["weight"] - kept["weight"]) < 0.5  # it has kept where it is

    job.until(0, lambda line: line["version"] > again["version"] + 3, since=again["time"])
    job.check_centers(0, 1, 2)
    for number, since in ((0, 0.0), (1, came), (2, 0.0)):  # whoever lives makes each of its steps once
        clocks = [line["clock"] for line in job.steps(number) if line["time"] > since]
        assert clocks == list(range(clocks[0], clocks[0] + len(clocks)))


def test_two_that_come_between_two_exchanges_of_one_that_trains(job):
    """They are enough for the lighthouse to go on without it: more than half of those that live."""
    slow = {"pace": 0.4, "tau": 10}  # 4 s; the lighthouse waits 2 s for those that are late
    job.start(0, **slow)
    job.until(0, lambda line: line["step"] == 11)
    for number in (1, 2):
        job.start(number, **slow)
    for number in (1, 2):
        assert job.until(number, lambda line: "clock" in line)["clock"] >= 10
    job.until(0, are(0, 1, 2))


@pytest.mark.parametrize(("wire_dtype", "operation"), [(None, "_exchange"), ("int8", "all_gather")])
def test_killed_inside_of_an_exchange(job, wire_dtype, operation):
    job.start(0, wire_dtype=wire_dtype)
    job.until(0, are(0))  # the other one would be at its tenth exchange before this one has come
    one = job.start(1, wire_dtype=wire_dtype, dies_in=[operation, 10 if wire_dtype is None else 20])
    assert one.wait(60) == -signal.SIGKILL
    last = job.steps(1)[-1]
    before = [line["failed"] for line in job.steps(0) if line["time"] <= last["time"]][-1]
    lost = job.until(0, lambda line: line["failed"] == before + 1)
    alone = job.until(0, are(0), since=lost["time"])
    assert lost["version"] == last["version"]  # the center has not moved
    assert alone["failed"] == before + 1
    job.check_centers(0, 1)
    clocks = [line["clock"] for line in job.steps(0)]
    assert clocks == list(range(clocks[0], clocks[0] + len(clocks)))


def test_a_lighthouse_that_is_away(job):
    workers = [job.start(0), job.start(1)]
    job.until(0, are(0, 1))
    before = job.until(1, are(0, 1))
    job.lighthouse.kill()
    away = time.time()
    job.lighthouse.wait(20)
    missed = [line["missed"] for line in job.steps(0) if line["time"] <= away][-1]
    meanwhile = job.until(0, lambda line: line["missed"] > missed, since=before["time"])
    without = job.until(0, lambda line: line["clock"] == meanwhile["clock"] + 30)  # an answer may have been under way
    on = job.until(0, lambda line: line["clock"] == without["clock"] + 30)
    assert on["version"] == without["version"]
    assert job.stood_still(0, away, on["time"]) <= PATIENCE + SLACK
    job.light()
    again = job.until(0, lambda line: line["version"] > on["version"] and line["living"] == [0, 1], since=on["time"])
    job.until(1, lambda line: line["version"] > again["version"] + 5, since=on["time"])
    job.check_centers(0, 1)
    assert all(worker.poll() is None for worker in workers)

    job.lighthouse.kill()  # a request that nobody answers does not hold up a worker's end
    missed = job.steps(0)[-1]["missed"]
    job.until(0, lambda line: line["missed"] > missed)
    job.signal(0, signal.SIGTERM)
    assert workers[0].wait(30) == 0


def test_torchrun_starts_a_worker_again(job):
    job.start(0, wire_dtype="bfloat16")
    job.until(0, are(0))  # the other one would have raised before this one has come
    job.start(1, *torchrun(1), wire_dtype="bfloat16", raises_at=25)
    first = job.until(1, are(0, 1))
    second = job.started_again(1)
    again = job.until(1, are(0, 1), since=second)
    assert again["clock"] > first["clock"]
    job.until(0, lambda line: line["version"] > again["version"], since=second)
    job.check_centers(0, 1)


@pytest.mark.parametrize(("is_sharded", "wire_dtype"), [(False, None), (True, None), (False, "int8")])
def test_workers_of_two_ranks(job, is_sharded, wire_dtype):
    settings = {"ranks": 2, "is_sharded": is_sharded, "wire_dtype": wire_dtype}
    workers = [job.start(number, *torchrun(2), **settings) for number in (0, 1)]
    for rank in ("0", "0.1", "1", "1.1"):
        job.until(rank, are(0, 1))
    job.until("1.1", lambda line: line["version"] > 12)

    job.signal("1.1", signal.SIGKILL)
    again = job.started_again(1)
    back = {rank: job.until(rank, are(0, 1), since=again) for rank in ("0", "0.1", "1", "1.1")}
    assert back["1"]["clock"] == back["1.1"]["clock"] > 60
    assert back["1"]["lr"] == back["1.1"]["lr"] == pytest.approx(0.05 * 0.99 ** (back["1"]["step"] // 10))
    for rank in back:
        job.until(rank, lambda line: line["version"] > back["1"]["version"] + 6, since=again)

    job.signal("0.1", signal.SIGTERM)  # both ranks of this worker stop, at one step
    assert workers[0].wait(30) == 0
    job.until(1, are(1), since=time.time())
    last = [job.steps(rank)[-1]["clock"] for rank in ("0", "0.1")]
    assert last[0] == last[1]

    job.check_centers("0", "1")
    job.check_centers("0.1", "1.1")
    if not is_sharded:
        job.check_centers("0", "0.1")
    if wire_dtype is None:
        for ranks in (("0", "1"), ("0.1", "1.1")):
            job.check_moves(*ranks, tau=5, beta=0.9, tolerance=1e-6)


@pytest.mark.parametrize(("ranks", "is_early"), [(1, False), (2, False), (1, True), (2, True)])
def test_who_waits_for_others_that_do_not_come_ends_by_sigterm(job, ranks, is_early):
    job.lighthouse.kill()
    job.lighthouse.wait()
    job.light(least=2)
    worker = job.start(0, *(torchrun(ranks, restarts=0) if ranks > 1 else ()), ranks=ranks, is_terminated=is_early)
    if not is_early:
        job.waits_at_the_lighthouse(0)
        worker.terminate()
    worker.wait(30 if is_early else 15)
    assert job.steps(0) == []


def test_a_worker_of_another_size_is_refused(job):
    job.start(0)
    job.until(0, are(0))
    two = job.start(1, *torchrun(2, restarts=0), ranks=2)
    assert two.wait(60) != 0
    assert "the worker with replica_id=0 has 1 ranks, and this one 2" in job.said(1)


def test_the_epoch_of_one_who_comes_ends_with_the_others(job):
    """Else schedules that know how many steps there are would be overrun."""
    job.start(0)
    job.until(0, lambda line: line["step"] > 55)
    job.start(1)
    came = job.until(1, are(0, 1))
    job.until(1, lambda line: line["epoch"] > came["epoch"] + 1)
    for number in (0, 1):
        assert [line for line in job.steps(number) if line["epoch"] != (line["step"] - 1) // 40] == []


def test_workers_of_different_fits_are_not_averaged(job):
    workers = [job.start(0, fits=2, steps=200), job.start(1, fits=2, steps=200, pace=0.03)]
    job.until(0, lambda line: line["step"] == 200)
    second = job.started_again(0)
    (ended,) = [line for line in job.steps(1) if line["step"] == 200]
    assert ended["time"] < second
    job.until(0, are(0, 1), since=second)
    assert job.start(2).wait(60) != 0
    assert "is in fit 2 of the job, and this one begins fit 1, which is over" in job.said(2)
    job.start(2, tolerance={"fit": 2})
    job.until(0, are(0, 1, 2), since=second)
    assert [worker.wait(60) for worker in workers] == [0, 0]


def test_fits_whose_ranks_are_forked_are_not_averaged_either(job):
    for number, pace in ((0, 0.01), (1, 0.25)):  # the first one does not wait for five steps of the other
        job.start(number, fits=2, steps=50, pace=pace, start_method="fork")
    begins = job.until(0, lambda line: True, since=job.started_again(0))
    (ended,) = [line for line in job.steps(1) if line["step"] == 50]
    assert ended["time"] < begins["time"]


def test_one_who_was_told_something_else_is_refused(job):
    first = job.start(0)
    job.until(0, are(0))
    for settings, said in (
        ({"tau": 7}, "EASGDStrategy(tau=7): the other workers have EASGDStrategy(tau=5); give all the same."),
        ({"tolerance": {"group_size": 4}}, "FaultTolerance(group_size=4): the other workers have"),
    ):
        assert job.start(1, **settings).wait(60) != 0
        assert said in job.said(1)
        job.until(0, are(0), since=time.time())
    assert first.poll() is None


def test_workers_whose_centers_differ_come_together_again(job):
    """As after each has gone on alone, one after the other."""
    job.start(0)
    job.until(0, are(0))
    job.start(1)
    first = job.until(1, are(0, 1))
    job.start(2, strays_at=first["step"] + 250)
    job.until(2, are(0, 1, 2))
    strayed = job.until(2, lambda line: line["step"] > first["step"] + 250)
    lost = [job.until(number, lambda line: line["failed"] > 0, since=strayed["time"] - 1) for number in (0, 1, 2)]
    since = max(line["time"] for line in lost) + 0.5
    for number in (0, 1, 2):
        again = job.until(number, are(0, 1, 2), since=since)
        job.until(number, lambda line, again=again: line["version"] > again["version"] + 8, since=since)
    job.check_centers(0, 1, 2, since=since)


def test_a_worker_may_look_for_its_learning_rate(job):
    """In a fit inside of its fit, which is no part of what the workers do together."""
    assert job.start(0, finds_rate=True, steps=30).wait(60) == 0
    job.start(1)
    job.until(1, are(1))
    job.start(2, finds_rate=True)
    assert job.until(2, are(1, 2))["clock"] > 0
    assert [line["step"] for line in job.lines(0) if line.get("event") == "ends"] == [30]


def test_a_proxy_is_not_between_workers(job, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://localhost:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    job.start(0)
    job.until(0, are(0))
    job.start(1)
    job.until(1, are(0, 1))
    assert job.start(1).wait(60) != 0
    assert "a worker with replica_id=1 is alive already" in job.said(1)


def test_where_warnings_are_errors_exchanges_are_made(job):
    """Kind: what another package warns of in its thread becomes its error, and an exchange that has come to nothing."""
    for number in (0, 1):
        job.start(number, is_strict=True)
    for number in (0, 1):
        assert job.until(number, are(0, 1))["failed"] == 0


def test_a_tuners_fit_is_none_of_the_jobs(job):
    job.start(0, tunes=True)
    job.until(0, are(0))
    job.start(1, tunes=True)
    job.until(1, are(0, 1))


def test_the_first_saves_and_all_go_on(job):
    workers = [job.start(number, wire_dtype="int8", saves_at=140, steps=160, pace=0.05) for number in (0, 1)]
    assert [worker.wait(100) for worker in workers] == [0, 0]
    first = {number: line["living"][0] for number in (0, 1) for line in job.steps(number) if line["step"] == 140}
    assert first[0] == 0
    assert {path.name for path in job.folder.glob("*.ckpt")} == {f"of_{number}.ckpt" for number in set(first.values())}
    end = time.time()
    for number in (0, 1, 2):
        job.start(number, wire_dtype="int8", resumes=str(job.folder / "of_0.ckpt"))
    for number in (0, 1, 2):
        assert job.until(number, are(0, 1, 2), since=end)["clock"] > 140
    moved = max(line["version"] for number in (0, 1, 2) for line in job.steps(number)[-1:])
    for number in (0, 1, 2):
        job.until(number, lambda line: line["version"] > moved + 6, since=end)
    job.check_centers(0, 1, 2, since=end)
    assert "saved by workers that come and go, of which this is number 0" in job.said(1)


def test_a_checkpoint_between_a_death_and_the_next_exchange_is_written(job):
    """Kind: what the dead worker would have done is nobody's until it is missed."""
    settings = {"saves_at": 38, "tau": 20, "pace": 0.2}
    job.start(0, **settings)
    job.start(1, **settings)
    job.until(1, lambda line: line["step"] == 21 and line["living"] == [0, 1])
    job.signal(0, signal.SIGKILL)
    last = job.until(1, lambda line: line["step"] == 39)
    assert last["living"] == [0, 1]  # as of the last exchange
    assert (job.folder / "of_1.ckpt").exists()


def test_links_to_the_last_checkpoint_are_made_by_the_worker_that_has_written_it(job):
    """Kind: what a callback does by itself beside the strategy is done by all workers in one folder."""
    for steps, resumes in ((62, None), (95, "last")):
        workers = [job.start(number, links=True, pace=0.04, steps=steps, resumes=resumes) for number in (0, 1)]
        assert [worker.wait(60) for worker in workers] == [0, 0], job.said(0) + job.said(1)
        links = [*(job.folder / "links").glob("last*.ckpt")]
        assert links
        assert all(link.is_symlink() and link.exists() for link in links)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_workers_of_two_ranks_save_and_go_on(job, is_sharded):
    settings = {"ranks": 2, "is_sharded": is_sharded, "pace": 0.02}
    workers = [job.start(number, *torchrun(2), saves_at=140, steps=160, **settings) for number in (0, 1)]
    assert [worker.wait(100) for worker in workers] == [0, 0]
    first = {number: line["living"][0] for number in (0, 1) for line in job.steps(number) if line["step"] == 140}
    assert first[0] == 0
    assert {path.name for path in job.folder.glob("*.ckpt")} == {f"of_{number}.ckpt" for number in set(first.values())}
    saved = job.folder / "of_0.ckpt"
    assert saved.is_dir() == is_sharded
    end = time.time()
    for number in (0, 1):
        job.start(number, *torchrun(2), resumes=str(saved), **settings)
    for rank in ("0", "0.1", "1", "1.1"):
        assert job.until(rank, are(0, 1), since=end)["clock"] > 140
    moved = job.steps(0)[-1]["version"]
    for rank in ("0", "0.1", "1", "1.1"):
        job.until(rank, lambda line: line["version"] > moved + 6, since=end)
    job.check_centers("0", "1", since=end)
    job.check_centers("0.1", "1.1", since=end)
    assert "starts at the center" not in job.said(0)
    devices = "2 x 1" if is_sharded else "2"
    assert f"saved by workers of {devices} devices that come and go, of which this is number 0" in job.said(1)
