"""One Ray for all ranks that a launcher such as torchrun starts on a node, where no Ray is named.

A Ray that one rank starts for itself would end with that rank, under the others. So a process apart from them, the
keeper, starts it, and ends it when no rank is left. Each rank holds a lock on a file, which the system takes back from
a process that is gone, however it went: killed processes leave nothing behind that could mislead the next ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import ray

from dinov3_ray.errors import PoolError, PoolTimeoutError
from dinov3_ray.machine import locks
from dinov3_ray.pool.cluster import Runtime, connect, use_token, without_uv
from dinov3_ray.pool.spec import Exist

__all__ = ["Rank", "connect_or_share"]


log = logging.getLogger("dinov3_ray")

_PATIENCE = 120.0  # seconds in which the keeper's Ray is up
_RETRY = 0.05
_ADDRESS, _KEEPER, _LOG, _RANKS, _TURN = "address.json", "keeper.lock", "keeper.log", "ranks.lock", "turn.lock"
# A launcher's words to its ranks: what they start in turn is none of them.
_LAUNCHERS = re.compile(r"(LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE)|(ROLE|MASTER|TORCHELASTIC|OMP_NUM)_.*")

#: This process's locks by file. Closing a file would give its lock back.
_locks: dict[Path, IO[str]] = {}


@dataclass(frozen=True, slots=True)
class Rank:
    """One of several processes that a launcher has started on this node.

    Attributes:
        launch: names the launch; the same in all of its ranks, and in no other launch at the same time.
        local_rank: its number among the ranks of this node.
    """

    launch: str
    local_rank: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Rank | None:
        """What ``environment`` says, in the variables of torchrun; None if it says of one process."""
        sizes = [environment.get(name, "") for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE")]
        size = next((int(size) for size in sizes if size.isdecimal()), 1)
        local_rank = environment.get("LOCAL_RANK", environment.get("RANK", ""))
        if size < 2 or not local_rank.isdecimal():
            return None
        names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
        return cls(" ".join(environment.get(name, "") for name in names), int(local_rank))


def connect_or_share(address: str | None, exist: Exist) -> Runtime:
    """As :func:`~dinov3_ray.pool.cluster.connect`, which may start a Ray; but the ranks of a node share one.

    Raises:
        PoolError: each rank would start a Ray, and a pool.
    """
    rank = Rank.of(os.environ)
    # Private, seen in Ray 2.60.0: the node that ray.init() has started here, or joined.
    node = ray._private.worker._global_node if ray.is_initialized() else None
    if rank is not None and node is not None and node.is_head():
        log.warning(
            "rank %d has started a Ray for itself, and so has a pool for itself: leave that to TeacherPool.start(..., "
            "exist='connect'), or connect all ranks to one Ray",
            rank.local_rank,
        )
    if rank is None or address or os.environ.get("RAY_ADDRESS") or ray.is_initialized():
        return connect(address, may_start=True)
    if exist == "connect":
        with without_uv():
            return connect(_shared_address(rank))
    if rank.local_rank:
        raise PoolError(
            f"this is rank {rank.local_rank} of several on this node, and each would start a Ray and a pool. Share one "
            "with TeacherPool.start(..., exist='connect'); or start a Ray first, with `ray start --head --port 6379`, "
            "and set RAY_ADDRESS=127.0.0.1:6379"
        )
    return connect(may_start=True)


def _shared_address(rank: Rank) -> str:
    """The address of the Ray of this rank's launch on this node, which is started if need be.

    Raises:
        PoolError: it does not start; says why.
        PoolTimeoutError: it is not up in time.
    """
    folder = _folder(rank.launch)
    deadline = time.monotonic() + _PATIENCE
    _lock(folder / _RANKS, deadline, shared=True)  # for as long as this process lives
    with _locked(folder / _TURN, deadline):
        if not _is_locked(folder / _KEEPER):
            _start_keeper(folder, deadline)
        found = json.loads((folder / _ADDRESS).read_text())
    if found["token"] and not os.environ.get("RAY_AUTH_MODE"):
        use_token()
    address = found["address"]
    assert isinstance(address, str)
    return address


def _start_keeper(folder: Path, deadline: float) -> None:
    (folder / _ADDRESS).unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if not _LAUNCHERS.fullmatch(name)}
    home = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (home, environment.get("PYTHONPATH"))))
    with (folder / _LOG).open("w") as log:
        # In a session apart, so that a Ctrl-C in the terminal ends the ranks, and only then the keeper.
        keeper = subprocess.Popen(  # noqa: S603 - this Python, this module
            [sys.executable, "-m", __spec__.name, str(folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    while not (folder / _ADDRESS).exists():
        if keeper.poll() is not None:
            lines = (folder / _LOG).read_text().strip().splitlines() or ["no message"]
            raise PoolError(f"the Ray that the ranks of this node share did not start: {lines[-1]} ({folder / _LOG})")
        if time.monotonic() > deadline:
            keeper.kill()
            raise PoolTimeoutError(
                f"the Ray that the ranks of this node share was not up within {_PATIENCE:g} s: see {folder / _LOG}"
            )
        time.sleep(_RETRY)


def _keep(folder: Path) -> None:
    """The keeper: a Ray for as long as there are ranks."""
    _lock(folder / _KEEPER, time.monotonic() + _PATIENCE)
    with contextlib.closing(connect(may_start=True)) as runtime:
        token = os.environ.get("RAY_AUTH_MODE") == "token"
        draft = folder / f"{_ADDRESS}.new"
        draft.write_text(json.dumps({"address": runtime.address, "token": token}))
        draft.rename(folder / _ADDRESS)
        # Waits until no rank is left; later ones wait for its end.
        locks.hold(_open(folder / _RANKS), wait=True, of_process=True)
        (folder / _ADDRESS).unlink()


def _folder(launch: str) -> Path:
    """For the files of a launch on this node, open to this user alone."""
    name = hashlib.sha256(launch.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"dinov3-ranks-{os.getuid()}" / name
    for path in (folder.parent, folder):
        path.mkdir(mode=0o700, exist_ok=True)
    status = folder.parent.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PoolError(f"{folder.parent} must belong to this user alone; remove it, or set TMPDIR to another folder")
    return folder


def _open(path: Path) -> IO[str]:
    if path not in _locks:
        _locks[path] = path.open("a+")
    return _locks[path]


def _lock(path: Path, deadline: float, *, shared: bool = False) -> None:
    while not _try(path, shared=shared):
        if time.monotonic() > deadline:
            raise PoolTimeoutError(f"another process of this launch has kept {path} for too long")
        time.sleep(_RETRY)


def _try(path: Path, *, shared: bool = False) -> bool:
    try:
        return locks.hold(_open(path), shared=shared, of_process=True)
    except OSError as error:
        raise PoolError(
            f"the ranks of this node cannot find each other: {path} cannot be locked ({error.strerror}). Remedy: set "
            "TMPDIR to a local disk, or start a Ray first and set RAY_ADDRESS"
        ) from error


@contextlib.contextmanager
def _locked(path: Path, deadline: float) -> Iterator[None]:
    _lock(path, deadline)
    try:
        yield
    finally:
        locks.release(_open(path))


def _is_locked(path: Path) -> bool:
    """Whether another process has it."""
    if not _try(path):
        return True
    locks.release(_open(path))
    return False


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
