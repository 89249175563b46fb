"""How long a controller waits for a replica's teacher: as long as something is being downloaded, and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from dinov3_ray.errors import CheckpointError, ReplicaError
from dinov3_ray.pool.control.loading import load_teacher
from dinov3_ray.pool.messages import TeacherInfo
from dinov3_ray.pool.spec import PoolOptions

OPTIONS = PoolOptions(startup_timeout=0.05, health_timeout=0.05)
MADE = TeacherInfo(fingerprint="made")


class Method:
    """An actor's method: ``method.remote()`` gives what is awaited."""

    def __init__(self, remote: Callable[[], Awaitable[object]]) -> None:
        self.remote = remote


class LoadingActor:
    """Loads once it was asked ``steps`` times how much has arrived, which is what ``arrived`` says."""

    def __init__(self, steps: int, *arrived: int | None, error: Exception | None = None) -> None:
        self._left, self._arrived, self._error = steps, iter(arrived), error
        self._asked = asyncio.Event()
        self.load, self.downloaded = Method(self._load), Method(self._say)

    async def _load(self) -> TeacherInfo:
        while self._left:
            await self._asked.wait()
            self._asked.clear()
            self._left -= 1
        if self._error:
            raise self._error
        return MADE

    async def _say(self) -> int | None:
        self._asked.set()
        try:
            return next(self._arrived)
        except StopIteration:
            return await asyncio.Event().wait()  # it hangs


def outcome(*arguments: int | None, error: Exception | None = None) -> TeacherInfo:
    async def run() -> TeacherInfo:
        steps, *arrived = arguments
        return await load_teacher(LoadingActor(steps or 0, *arrived, error=error), OPTIONS)

    return asyncio.run(run())


def test_a_teacher_that_loads_in_time() -> None:
    assert outcome(0) is MADE


def test_a_download_that_goes_on() -> None:
    assert outcome(3, 0, 10, 20) is MADE


@pytest.mark.parametrize("arrived", [(None,), (0, 0), (10, 20, 20), (10, None)])
def test_nothing_comes(arrived: tuple[int | None, ...]) -> None:
    with pytest.raises(ReplicaError, match=r"no answer to load within 0\.05 s"):
        outcome(100, *arrived)


def test_a_replica_that_hangs() -> None:
    with pytest.raises(TimeoutError):
        outcome(100, 10)


def test_a_teacher_that_cannot_be_loaded() -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        outcome(1, 5, error=CheckpointError("damaged"))
