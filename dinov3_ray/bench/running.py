"""Ray for the time of a measurement, and a line at the terminal that says what is being measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

from rich.console import Console

from dinov3_ray.pool.cluster import connect

__all__ = ["running"]

_STORE_BYTES = 2 * 2**30  # room for every contender's results in flight, and for those not freed yet


@contextmanager
def running(address: str | None, *, store_bytes: int = _STORE_BYTES) -> Iterator[Callable[[str], None]]:
    """Use the Ray at ``address``, or RAY_ADDRESS, or one that is started with an object store of ``store_bytes`` and
    ends here.

    Yields:
        What to tell each step's name.
    """
    # Ray tells on standard output, whatever it is asked, of tasks that end and of many processes, the last of it as it
    # ends: tables and JSON are to stand there alone.
    with redirect_stdout(sys.stderr):
        runtime = connect(address, may_start=True, object_store_memory=store_bytes)
        try:
            with Console(stderr=True).status("starting") as status:
                yield lambda step: status.update(f"measuring {step}")
        finally:
            runtime.close()
