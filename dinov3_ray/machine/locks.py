"""Locks on files: of the kernel, which takes them back from a process that is gone, however it went.

Lustre without the mount option ``flock``, and NFS without a lock daemon, have none: there, a lock ends in ENOLCK,
ENOSYS or EOPNOTSUPP (flock(2), fcntl(2)).
"""

from __future__ import annotations

import errno
from typing import IO

try:
    import fcntl
except ImportError as error:
    raise ImportError(
        "dinov3_ray's pools and data sets need file locks, for which this Python has no module fcntl: use Linux, or "
        "WSL on Windows. DinoV3Config, DinoV3Teacher and dinov3_ray.training work without"
    ) from error

__all__ = ["hold", "lacks_locks", "release"]

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def hold(file: IO[str], *, shared: bool = False, wait: bool = False, of_process: bool = False) -> bool:
    """Lock ``file`` until it is closed; False if it is locked already, unless ``wait``.

    Args:
        shared: whether others may hold it too, if they share it.
        wait: until it is free.
        of_process: whether the lock is this process's alone, and not of its forks; else it is that of this open file.

    Raises:
        OSError: it cannot be locked; :func:`lacks_locks` says whether nothing can where it lies.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    lock = fcntl.lockf if of_process else fcntl.flock
    try:
        lock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def release(file: IO[str]) -> None:
    """Give up this process's lock on ``file``."""
    fcntl.lockf(file, fcntl.LOCK_UN)


def lacks_locks(error: OSError) -> bool:
    """Whether ``error`` says that the file system has no locks."""
    return error.errno in _NO_LOCKS
