"""Ray without processes that no test looks at: each Ray that is started costs half of the CPU time then.

They are the log monitor (log_to_driver is off), the autoscaler's (nothing scales) and the dashboard's head, which runs
even without a dashboard. Ray has no public options for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from forked_workers import fork_workers
from ray._private.node import Node
from ray.cluster_utils import Cluster

__all__ = ["STORE_BYTES", "lean_cluster", "start_lean_rays"]

STORE_BYTES = 100 * 2**20


def start_lean_rays() -> None:
    """Have this process start every Ray so."""
    for name in ("start_log_monitor", "start_monitor"):
        setattr(Node, name, lambda self: None)
    Node.start_api_server = _without_api_server  # type: ignore[method-assign]
    fork_workers()


def _without_api_server(self: Any, **_: object) -> None:
    self._webui_url = ""


@contextmanager
def lean_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster with its files in ``folder``, whose head gives no CPUs, until the end of this script.

    The file in which Ray keeps the address of this machine's cluster is there too: a user's own stays as it is.
    """
    start_lean_rays()
    os.environ["RAY_TMPDIR"] = str(folder)
    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "temp_dir": str(folder / "ray")}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
