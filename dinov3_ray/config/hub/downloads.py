"""Downloads that this process waits for: how much has arrived, for its log and for whoever waits for the process.

The cache's folder is looked at, since each version of huggingface_hub reports progress in another way, and another
process may be downloading what this one waits for.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from dinov3_ray.config.hub.snapshots import entries_of

__all__ = ["arrived_bytes", "watching_download"]

log = logging.getLogger("dinov3_ray")

_EVERY = 30.0  # seconds between lines in the log

_lock = threading.Lock()
_folders: list[Path] = []  # one for each download that this process waits for


def arrived_bytes() -> int | None:
    """Bytes in the caches of the models that this process waits for; None if it waits for none."""
    with _lock:
        folders = list(_folders)
    return sum(map(_size_of, folders)) if folders else None


@contextlib.contextmanager
def watching_download(what: str, folder: Path, total: int, *, in_log: bool) -> Iterator[None]:
    """Within it, ``what`` is downloaded into a model's folder of the cache.

    Args:
        total: bytes to come; 0 if that is not known.
        in_log: whether to log how far it is every half a minute. It is a warning, as only those reach the log of a
            process in which nobody set up logging, such as a replica.
    """
    before = _size_of(folder)
    over = threading.Event()

    def report() -> None:
        begun = time.monotonic()
        while not over.wait(_EVERY):
            arrived, seconds = _size_of(folder) - before, time.monotonic() - begun
            of = f" of {total / 1e9:.2f}" if total else ""
            log.warning("%s: %.2f%s GB downloaded to %s in %.0f s", what, arrived / 1e9, of, folder, seconds)

    with _lock:
        _folders.append(folder)
    if in_log:
        threading.Thread(target=report, name="dinov3-download", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        with _lock:
            _folders.remove(folder)


def _size_of(folder: Path) -> int:
    size = 0
    for path in entries_of(folder / "blobs"):
        with contextlib.suppress(OSError):  # it was renamed, or deleted, since it was listed
            size += path.stat().st_size
    return size
