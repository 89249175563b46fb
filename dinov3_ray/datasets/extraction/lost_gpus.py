"""Notices GPUs that the cluster has lost since a run began, so that the run can report them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from dinov3_ray.datasets.extraction.resources import Allocation

__all__ = ["lost", "watching"]

logger = logging.getLogger("dinov3_ray")

_WATCH_SECONDS = 10.0


def lost(allocation: Allocation, resources: Mapping[str, float]) -> str | None:
    """What is missing in a cluster of ``resources``, and what to do; None if nothing is."""
    wanted, found = allocation.replicas * allocation.num_gpus, resources.get("GPU", 0.0)
    if found >= wanted:
        return None
    return (
        f"the cluster has {found:g} of the {wanted:g} GPUs that the teachers began with: blocks that were on the rest "
        "wait for a node in their place. To go on without it, interrupt this run, and run the same command again"
    )


@contextmanager
def watching(allocation: Allocation) -> Iterator[None]:
    """Look at the cluster's GPUs now and then, and log a warning when some have gone for longer than a moment."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(allocation, ended), name="dinov3-ray-watch", daemon=True)
    if allocation.num_gpus:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if allocation.num_gpus:
            thread.join()


def _watch(allocation: Allocation, ended: threading.Event) -> None:
    before, warned = None, False
    while not ended.wait(_WATCH_SECONDS):
        try:
            now = lost(allocation, ray.cluster_resources())
        except ray.exceptions.RayError as error:
            logger.debug("the cluster's resources are not known: %s", error)
            continue
        if now and before and not warned:
            logger.warning("%s", now)
        if warned and not now:
            logger.warning("the cluster has all GPUs again that the teachers began with")
        before, warned = now, bool(now and (before or warned))
