"""Tells that the cluster lost GPUs which teachers began with, since their blocks then wait for a node to come back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from dinov3_ray.datasets.placement import Placement

__all__ = ["lost", "watching"]

logger = logging.getLogger("dinov3_ray")

_SECONDS = 10.0


def lost(placement: Placement, resources: Mapping[str, float]) -> str | None:
    """What is missing in a cluster of ``resources``, and what to do; None if nothing is."""
    wanted, found = placement.replicas * placement.num_gpus, resources.get("GPU", 0.0)
    if found >= wanted:
        return None
    return (
        f"the cluster has {found:g} of the {wanted:g} GPUs that the teachers began with: blocks that were on the rest "
        "wait for a node in their place. To go on without it, interrupt this run, and run the same command again"
    )


@contextmanager
def watching(placement: Placement) -> Iterator[None]:
    """Look at the cluster's GPUs now and then, and log a warning when some have gone for longer than a moment."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(placement, ended), name="dinov3-ray-watch", daemon=True)
    if placement.num_gpus:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if placement.num_gpus:
            thread.join()


def _watch(placement: Placement, ended: threading.Event) -> None:
    before, told = None, False
    while not ended.wait(_SECONDS):
        try:
            now = lost(placement, ray.cluster_resources())
        except ray.exceptions.RayError as error:
            logger.debug("the cluster's resources cannot be told: %s", error)
            continue
        if now and before and not told:
            logger.warning("%s", now)
        if told and not now:
            logger.warning("the cluster has all GPUs again that the teachers began with")
        before, told = now, bool(now and (before or told))
