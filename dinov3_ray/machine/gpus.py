"""Finds out whether this machine has GPUs, without loading torch or a driver's library."""

from __future__ import annotations

from pathlib import Path

__all__ = ["has_gpus"]


def has_gpus(system: Path = Path("/")) -> bool:
    """Whether a driver has made the device files of a GPU: NVIDIA's, AMD's, or that of Windows under WSL.

    Args:
        system: the root of the file system whose /dev is read.
    """
    return any(path for name in ("nvidia[0-9]*", "kfd", "dxg") for path in (system / "dev").glob(name))
