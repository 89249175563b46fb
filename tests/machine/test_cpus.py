"""CPUs by cgroup and affinity, read from file systems as containers and services see them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dinov3_ray.machine.cpus import usable_cpus

V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
CASES: dict[str, tuple[str, str, dict[str, str], int]] = {
    # /proc/self/cgroup, a mount, files below /sys/fs/cgroup, CPUs of the 64 that there are
    "no limit": ("0::/", V2, {}, 64),
    "docker run --cpus 4": ("0::/", V2, {"cpu.max": "400000 100000"}, 4),
    "unlimited": ("0::/", V2, {"cpu.max": "max 100000"}, 64),
    "half a CPU": ("0::/", V2, {"cpu.max": "50000 100000"}, 1),
    "2.9 CPUs": ("0::/", V2, {"cpu.max": "290000 100000"}, 2),
    "more than there are": ("0::/", V2, {"cpu.max": "9900000 100000"}, 64),
    "systemd's CPUQuota of the slice above": (
        "0::/system.slice/pool.service",
        V2,
        {"system.slice/cpu.max": "300000 100000", "system.slice/pool.service/cpu.max": "max 100000"},
        3,
    ),
    "the least of both": ("0::/a/b", V2, {"a/cpu.max": "500000 100000", "a/b/cpu.max": "200000 100000"}, 2),
    "a namespace that does not reach so far": ("0::/../../other", V2, {"cpu.max": "700000 100000"}, 7),
    "version 1, mounted as a whole": (
        "4:memory:/docker/1\n2:cpu,cpuacct:/docker/1",
        "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
        {"cpu,cpuacct/docker/1/cpu.cfs_quota_us": "600000", "cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000"},
        6,
    ),
    "version 1, of which a container sees its part": (
        "2:cpu,cpuacct:/docker/1",
        "33 31 0:30 /docker/1 /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct",
        {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "50000"},
        3,
    ),
    "version 1, unlimited": (
        "2:cpu:/",
        "33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        64,
    ),
    "another controller's": (
        "2:cpuset:/",
        "33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset",
        {"cpuset/cpu.cfs_quota_us": "100000", "cpuset/cpu.cfs_period_us": "100000"},
        64,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_quotas(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroup, mount, files, expected = CASES[case]
    written = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": f"23 1 8:1 / / rw - ext4 /dev/sda1 rw\n{mount}"}
    for name, text in (written | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert usable_cpus(tmp_path) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to CPUs")
def test_affinity() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_a_system_without_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cpus(tmp_path) == os.cpu_count()
