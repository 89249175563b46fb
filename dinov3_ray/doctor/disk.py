"""The disk that Ray logs and spills to: its room and its speed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from dinov3_ray.doctor.finding import Finding, fine, problem, warning

__all__ = ["check_disk"]

_PROBE_BYTES = 64 * 2**20
_LEAST_FREE = 5 * 2**30
_SLOW = 50e6  # bytes a second


def check_disk(folder: Path | None = None) -> Finding:
    """Write 64 MiB to ``folder`` (the one for temporary files), wait until they are on the disk, and remove them."""
    folder = folder or Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    other = "give `ray start` a --temp-dir on another disk"
    if free < _LEAST_FREE:
        remedy = f"make room, or {other}: Ray stops at 95% of a disk"
        return problem("disk", f"{folder} has {free / 2**30:.1f} GiB free; Ray's logs need {_LEAST_FREE >> 30}", remedy)
    chunk = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.monotonic()
        for _ in range(_PROBE_BYTES // len(chunk)):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        speed = _PROBE_BYTES / (time.monotonic() - began)
    told = f"{folder} has {free / 2**30:.0f} GiB free and takes {speed / 1e6:.0f} MB/s"
    if speed < _SLOW:
        return warning("disk", f"{told}: objects that are spilled there stop trainers", other)
    return fine("disk", told)
