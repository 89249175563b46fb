"""The Ray that a bench measures on: the user's, or one that it starts and ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

from rich.console import Console

from dinov3_ray.pool.cluster import connect

__all__ = ["running"]

_STORE_BYTES = 2 * 2**30  # room for each contender's results in flight, and for those that are not freed yet


@contextmanager
def running(
    address: str | None, *, store_bytes: int = _STORE_BYTES, num_gpus: int | None = None
) -> Iterator[Callable[[str], None]]:
    """Connect to the Ray at ``address`` or RAY_ADDRESS, or start one with an object store of ``store_bytes``.

    One that is started has ``num_gpus``, or as many as it finds.

    Standard output goes to standard error meanwhile. A Ray that was started here ends with the block.

    Yields:
        The function to call with the name of each step.
    """
    # Whatever its settings, Ray reports on standard output until it has ended; only tables and JSON belong there.
    with redirect_stdout(sys.stderr):
        runtime = connect(address, may_start=True, object_store_memory=store_bytes, num_gpus=num_gpus)
        try:
            with Console(stderr=True).status("starting") as status:
                yield lambda step: status.update(f"measuring {step}")
        finally:
            runtime.close()
