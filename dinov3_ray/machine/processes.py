"""What Linux says of its processes: the stat files of /proc."""

from __future__ import annotations

from pathlib import Path

__all__ = ["PARENT", "STARTED", "STATE", "SYSTEM_TICKS", "USER_TICKS", "read_stat"]

# The fields of a stat file behind the name, which may contain any character.
STATE, PARENT, USER_TICKS, SYSTEM_TICKS, STARTED = 0, 1, 11, 12, 19


def read_stat(folder: Path) -> tuple[str, list[str]] | None:
    """The name of the process or thread at ``folder`` (such as /proc/1), and the fields behind it; None if it has
    ended.
    """
    try:
        before, _, after = (folder / "stat").read_text().rpartition(")")
    except OSError:
        return None
    return before.partition("(")[2], after.split()
