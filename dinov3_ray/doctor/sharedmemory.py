"""Shared memory, which holds Ray's object store: images and features on their way."""

from __future__ import annotations

import shutil
from pathlib import Path

from dinov3_ray.doctor.finding import Finding, fine, problem, warning

__all__ = ["check_shared_memory"]

_LEAST = 2**30
_COMFORTABLE = 4 * 2**30


def check_shared_memory(path: Path = Path("/dev/shm")) -> Finding:  # noqa: S108 (it is what is looked at)
    if not path.is_dir():
        return warning("shared memory", f"there is no {path}: Ray keeps its objects on disk", "mount a tmpfs there")
    total = shutil.disk_usage(path).total
    told = f"{path} has {total / 2**30:.1f} GiB"
    remedy = "docker run --shm-size=10g, an emptyDir of medium Memory in Kubernetes, or mount -o remount,size=10g"
    if total < _LEAST:
        return problem("shared memory", f"{told}, less than 1 GiB: Ray would keep its objects on disk", remedy)
    if total < _COMFORTABLE:
        return warning("shared memory", f"{told}; the queue of one replica alone may take 2 GiB", remedy)
    return fine("shared memory", told)
