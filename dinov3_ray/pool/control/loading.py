"""Waits until a replica has its teacher: no longer than it may take, but for as long as a download goes on."""

from __future__ import annotations

import asyncio
from typing import Any

from dinov3_ray.errors import ReplicaError
from dinov3_ray.pool.messages import TeacherInfo
from dinov3_ray.pool.spec import PoolOptions

__all__ = ["load_teacher"]


async def load_teacher(actor: Any, options: PoolOptions) -> TeacherInfo:
    """What a replica says of its teacher, once that is loaded and proven.

    A model of the hub may take longer to download than a teacher may take to load: ``startup_timeout`` begins anew
    while the download brings something.

    Raises:
        ReplicaError: there is none within ``startup_timeout``, and nothing is being downloaded.
        TimeoutError: it does not say whether anything is, within ``health_timeout``.
        RayError: as the replica raised it.
    """
    loading, arrived = asyncio.ensure_future(actor.load.remote()), -1
    try:
        while True:
            done, _ = await asyncio.wait([loading], timeout=options.startup_timeout)
            if done:
                info: TeacherInfo = loading.result()
                return info
            now: int | None = await asyncio.wait_for(actor.downloaded.remote(), options.health_timeout)
            if now is None or now <= arrived:
                raise ReplicaError(f"no answer to load within {options.startup_timeout:g} s")
            arrived = now
    finally:
        loading.cancel()
