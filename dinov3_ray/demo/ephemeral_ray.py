"""The Ray of the demonstration: the one that the user names, or one that is started and removed without a trace."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import ray

from dinov3_ray.pool.cluster import Runtime, connect

__all__ = ["DemoRay", "gpus_per_replica", "make_folder", "remove_folder"]

_OBJECT_STORE_BYTES = 200 * 2**20  # a batch and its maps are about 5 MB
_PATIENCE = 2.0  # seconds that Ray's processes have to end by themselves: they hold nothing worth saving
_AUTH_MODE = "RAY_AUTH_MODE"


class DemoRay:
    """Ray for one run. :meth:`close` may be called at any time, and again if an interrupt cut it short.

    Args:
        address: ``host:port`` of a running Ray. None takes RAY_ADDRESS, or else starts a Ray in ``folder`` that has
            its own token, no dashboard and a small object store.
        folder: for the files of a Ray that is started. Its path must be short: the paths of Ray's sockets are limited
            to about 100 characters.
    """

    def __init__(self, address: str | None, folder: Path) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS") or None
        self._folder = folder
        self._was_connected = ray.is_initialized()
        self._runtime: Runtime | None = None
        self._environment: dict[str, str | None] = {}

    @property
    def embedded(self) -> bool:
        """Whether this run starts its own Ray."""
        return self._address is None

    @property
    def free_gpus(self) -> float:
        """The GPUs of the cluster that are free now."""
        return float(ray.available_resources().get("GPU", 0))

    def start(self) -> None:
        """Connect. An interrupt may cut this short anywhere; :meth:`close` cleans up after that too.

        Raises:
            PoolError: Ray cannot be reached or started.
        """
        self._set_environment({_AUTH_MODE: os.environ.get(_AUTH_MODE)})  # ray.init() changes it; close() restores it
        if not self.embedded:
            self._runtime = connect(self._address)
            return
        token = self._folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        # Without a path, Ray writes its token to ~/.ray, where anyone may read it. Usage reports are turned off.
        self._set_environment({"RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"})
        self._runtime = connect(
            may_start=True,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(self._folder / "ray"),
            logging_level="ERROR",  # it would warn that it uses the token
        )

    def close(self) -> None:
        """Disconnect; end every process of a Ray that was started here."""
        if self._runtime is not None:
            self._runtime.close()
        if not self._was_connected:
            ray.shutdown()  # ends a connection that an interrupt left half made
        if self.embedded:
            _end_users_of(self._folder)
        self._set_environment(dict(self._environment))

    def _set_environment(self, values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            self._environment.setdefault(name, os.environ.get(name))
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def make_folder() -> Path:
    """A new folder with a short path, for this user alone."""
    # As Ray itself does: the default of some systems, such as macOS, is too long for the paths of sockets.
    parent = "/tmp" if os.path.isdir("/tmp") else None  # noqa: S108 - mkdtemp makes it safe
    return Path(tempfile.mkdtemp(prefix="dinov3-", dir=parent))


def remove_folder(folder: Path) -> None:
    """Remove ``folder``; ignore errors, since processes that are ending may still write a last line of log into it."""
    shutil.rmtree(folder, ignore_errors=True)


def gpus_per_replica(replicas: int, free_gpus: float) -> float:
    """GPUs per replica, so that all ``replicas`` find room at once: 1, a share of one, or 0 if no whole GPU is free."""
    if free_gpus < 1:
        return 0.0
    sharers = math.ceil(replicas / int(free_gpus))
    return 1.0 if sharers == 1 else math.floor(1e4 / sharers) / 1e4  # Ray counts in ten-thousandths


def _end_users_of(folder: Path) -> None:
    """Wait until no other process has a file below ``folder`` open, as all of Ray's have; kill those that do for long.

    Ray itself does not wait for its workers, nor for those that are being started while it ends. Without /proc, this
    does nothing.
    """
    deadline = time.monotonic() + _PATIENCE
    while users := _users_of(folder):
        if time.monotonic() > deadline:
            for pid in users:
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _users_of(folder: Path) -> list[int]:
    prefix = f"{folder.resolve()}/"
    own = str(os.getpid())
    return [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if process.name != own and any(target.startswith(prefix) for target in _open_files(process))
    ]


def _open_files(process: Path) -> Iterator[str]:
    try:
        for entry in os.scandir(process / "fd"):
            yield os.readlink(entry.path)
    except OSError:
        return  # the process has ended, or belongs to another user
