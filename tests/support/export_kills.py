"""An export that is killed with -9 at each of its moments, one after the other, and resumed after each.

The moments are the rows that it reads, and its operations on files below the folder in which it grows. Each export runs
in a fork of a process that has started no threads::

    python tests/support/export_kills.py STORE FORMAT FOLDER SHARD_SIZE [EVERY_NTH_ROW]

It writes the undisturbed export to FOLDER/undisturbed, and each resumed one to FOLDER/row-N or FOLDER/operation-N. What
it prints is JSON: the number of exports that were killed, of each kind.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset  # noqa: F401 - here and below: once, before the forks

import dinov3_ray.datasets.exports.export
import dinov3_ray.datasets.exports.npy
import dinov3_ray.datasets.exports.webdataset  # noqa: F401
from dinov3_ray.datasets import FeatureStore, export

_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.truncate"}


def _kill_when_it_comes_to(count: int) -> Callable[[], None]:
    left = count

    def come() -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    return come


def at_row(count: int) -> None:
    """This process ends as it reads its ``count``-th row."""
    come, arrays = _kill_when_it_comes_to(count), FeatureStore.arrays

    def counted(store: FeatureStore, id_: str) -> Any:
        come()
        return arrays(store, id_)

    FeatureStore.arrays = counted  # type: ignore[method-assign]


def at_operation(count: int) -> None:
    """This process ends as it comes to its ``count``-th operation on a file of an export that is not whole."""
    come = _kill_when_it_comes_to(count)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _OPERATIONS and ".partial" in str(arguments[0]):
            come()

    sys.addaudithook(hook)


def run(store: str, to: Any, dest: Path, shard_size: int, arm: Callable[[], None]) -> bool:
    """Export in a process of its own; whether it was killed."""
    child = os.fork()
    if not child:
        status = 1
        try:
            os.fsync = lambda _: (
                None
            )  # the machine goes on: what was written is there, and waiting takes most of the time
            arm()
            export(store, to, dest, shard_size=shard_size, progress=False)
            status = 0
        finally:  # nothing goes on in the fork that is the parent's to do
            if status:
                traceback.print_exc()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status:
        raise RuntimeError(f"the export to {dest} failed: {status}")
    return killed


def main() -> None:
    store, to, folder, shard_size, *step = sys.argv[1:]
    out, size = Path(folder), int(shard_size)
    assert not run(store, to, out / "undisturbed", size, lambda: None)
    killed = {}
    for kind, arm, by in (("operation", at_operation, 1), ("row", at_row, int(step[0]) if step else 1)):
        moment = 1
        while run(store, to, out / f"{kind}-{moment}", size, lambda arm=arm, moment=moment: arm(moment)):  # type: ignore[misc]
            dest = out / f"{kind}-{moment}"
            assert not dest.exists() or json.loads((dest / "export.json").read_bytes())["complete"]
            assert not run(store, to, dest, size, lambda: None)
            moment += by
        killed[kind] = -(-(moment - 1) // by)
    print(json.dumps(killed))


if __name__ == "__main__":
    main()
