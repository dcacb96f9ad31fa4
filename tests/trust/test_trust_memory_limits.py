"""Kind: a limit that some group above, or the older version of control groups, sets."""

import os

import pytest

from lightning_easgd.transport.available_memory import available_memory

MIB = 2**20
NO_LIMIT_1 = 9223372036854771712  # what version 1 shows for none


def version2(folder, limit, used, inactive=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def version1(folder, limit, used, inactive=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 1\ninactive_file 1\ntotal_inactive_file {inactive}\n")


@pytest.fixture
def machine(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99999 kB\nMemAvailable: 1048576 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/slurm/job_7/step_0\n")
    (tmp_path / "proc/self/mountinfo").write_text("30 24 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n")
    return tmp_path


def test_the_limit_of_a_group_above_counts(machine):
    groups = machine / "sys/fs/cgroup"
    version2(groups / "slurm/job_7/step_0", "max", 10 * MIB)
    version2(groups / "slurm/job_7", 100 * MIB, 40 * MIB, inactive=5 * MIB)
    version2(groups / "slurm", 500 * MIB, 40 * MIB)
    assert available_memory(machine) == 65 * MIB


def test_the_tightest_group_counts(machine):
    groups = machine / "sys/fs/cgroup"
    version2(groups / "slurm/job_7/step_0", 90 * MIB, 10 * MIB)
    version2(groups / "slurm/job_7", 300 * MIB, 270 * MIB)  # other steps of the job have most of it
    assert available_memory(machine) == 30 * MIB


def test_version_1(machine):
    (machine / "proc/self/cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/slurm/uid_0/job_7/step_0\n0::/\n")
    (machine / "proc/self/mountinfo").write_text(
        "31 24 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        "32 24 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "33 24 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    )
    groups = machine / "sys/fs/cgroup/memory"
    version1(groups / "slurm/uid_0/job_7/step_0", NO_LIMIT_1, 0)
    version1(groups / "slurm/uid_0/job_7", 200 * MIB, 60 * MIB, inactive=10 * MIB)
    assert available_memory(machine) == 150 * MIB


@pytest.mark.parametrize("group", ["/", "/docker/abc"])
def test_in_a_container_that_sees_only_its_own_group(machine, group):
    (machine / "proc/self/cgroup").write_text(f"4:memory:{group}\n")
    (machine / "proc/self/mountinfo").write_text(
        "32 24 0:29 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    )
    version1(machine / "sys/fs/cgroup/memory", 80 * MIB, 30 * MIB)
    assert available_memory(machine) == 50 * MIB


def test_more_than_the_limit_is_nothing_left(machine):
    version2(machine / "sys/fs/cgroup/slurm", 10 * MIB, 20 * MIB)
    assert available_memory(machine) == 0


@pytest.mark.parametrize("text", ["0::/slurm/job_7/step_0\n", "", "garbage\n"])
def test_without_limits_the_system_counts(machine, text):
    (machine / "proc/self/cgroup").write_text(text)
    version2(machine / "sys/fs/cgroup/slurm", "max", 10 * MIB)
    assert available_memory(machine) == 1024 * MIB


def test_here():
    assert 0 < available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
