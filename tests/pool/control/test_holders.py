"""Who holds a pool, as its controller asks."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from dinov3_ray.pool.cluster import process_start
from dinov3_ray.pool.control.holders import Holder


def test_a_controller_that_asks_late_hears_that_the_process_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
        holder = Holder(process.pid, process_start(process.pid))
        process.kill()
    asyncio.run(asyncio.wait_for(holder.hold(), 20))
