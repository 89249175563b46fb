"""The folder for the files of a Ray that is started here: writable, and short enough for the paths of its sockets."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["RayFolder"]

_LONGEST = 103 if sys.platform == "darwin" else 107  # bytes of a socket's path: unix(7), unix(4)


class RayFolder:
    """Which folder a Ray takes: ``path``, and ``trouble``, what is wrong with Ray's own choice; "" if nothing is.

    Ray takes ``ray`` in RAY_TMPDIR, TMPDIR or /tmp; an empty variable counts as unset here. TMPDIR is often long,
    and /tmp/ray another user's: then a folder of this user's below ``fallback`` takes its place. A RAY_TMPDIR is
    obeyed, whatever is wrong with it.

    Args:
        environment: such as ``os.environ``.
    """

    def __init__(self, environment: Mapping[str, str], fallback: Path = Path("/tmp")) -> None:  # noqa: S108
        self.variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if environment.get(name)), "")
        self.path = Path(environment.get(self.variable, "/tmp"), "ray")  # noqa: S108 - Ray's own choice
        self.trouble = _trouble(self.path)
        self.usable = not self.trouble
        if self.trouble and self.variable != "RAY_TMPDIR":
            other = fallback / f"ray-{os.getuid()}"
            self.usable = not _trouble(other)
            self.path = other if self.usable else self.path


def _trouble(folder: Path) -> str:
    if not folder.is_absolute():
        return f"{folder} is relative, and the processes of Ray have other working directories"
    # The longest path that Ray 2.60.0 has there.
    longest = _LONGEST - len(f"/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store")
    if len(os.fsencode(folder)) > longest:
        return f"{folder} is longer than {longest} bytes, with which the paths of Ray's sockets are too long"
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        return f"{there} is not a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"this user may not write to {there}"
    return ""
