"""How many CPUs this process may use, which in a container, a Slurm step or a systemd unit are fewer than there are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["usable_cpus"]


def usable_cpus(system: Path = Path("/")) -> int:
    """The CPUs that this process may use, at least 1.

    It may be bound to some (a cpuset, taskset, Slurm), and the cgroups that it is in may have a limited share of their
    time (Docker's ``--cpus``, Kubernetes' limits, systemd's CPUQuota). The least counts; part of a CPU counts for
    nothing, as in Ray, since a thread too many makes all of them wait for the next period.

    Sources: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max), and for version 1
    https://docs.kernel.org/scheduler/sched-bwc.html.

    Args:
        system: the root of the file system whose /proc and cgroups are read.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([bound, *_quotas(system)])))


def _quotas(system: Path) -> Iterator[float]:
    """CPUs whose time each of this process's cgroups may take, where it is limited."""
    for folder in _cgroups(system):
        try:
            if (folder / "cpu.max").exists():  # version 2
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                yield int(quota) / int(period)
        except (OSError, ValueError):
            continue  # the topmost cgroup has no such file, nor has one whose CPUs nobody controls


def _cgroups(system: Path) -> Iterator[Path]:
    """The folders of the cgroups that this process is in, and of those above them, which limit it as well."""
    try:
        memberships = (system / "proc/self/cgroup").read_text().splitlines()
        mounts = (system / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return  # not Linux
    paths: dict[str, PurePosixPath] = {}
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), PurePosixPath(path))  # version 2 names no controllers
    for mount in mounts:
        place, _, details = mount.partition(" - ")
        kind, _, options = details.split(" ", 2)
        controller = {"cgroup": "cpu", "cgroup2": ""}.get(kind)
        if controller not in paths or controller not in ["", *options.split(",")]:
            continue
        root, point = place.split()[3:5]
        folder = system / point.lstrip("/")
        yield folder
        # In a namespace of its own, a container sees its cgroup as the root; without one, only that part is mounted.
        own = paths[controller]
        for part in own.relative_to(root).parts if own.is_relative_to(root) and ".." not in own.parts else ():
            folder /= part
            yield folder


if __name__ == "__main__":  # for deploy/ray/common.sh
    print(usable_cpus())
