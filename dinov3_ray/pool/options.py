"""The knobs of a pool, checked once, with the reason for each default."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

from dinov3_ray.errors import ConfigError

__all__ = ["Batching", "PoolOptions", "ReplicaCount", "parse_replicas"]

Batching = Literal["exact", "dynamic", "deterministic"]
ReplicaCount = int | Literal["auto"] | tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """How a pool batches, bounds and watches.

    Args:
        max_batch: the most images in one forward pass; larger batches are cut and rejoined by the client.
        batching: ``exact`` runs each request as it was submitted, so remote results equal local ones bit for bit;
            ``dynamic`` runs small requests of several clients together; ``deterministic`` pads every forward pass to
            ``max_batch`` images, so that a row's value never depends on its neighbours.
        max_wait: seconds that a request may wait for company under ``dynamic`` and ``deterministic`` batching.
        max_queued: requests that a replica holds before it turns more away (clients then wait and come back).
        max_queued_bytes: likewise, bytes of their images; they pin the object store of the replica's node.
        window: requests that one client keeps at one replica: one computing, and the next ones already transferred.
        threads: CPU threads a replica computes with; None shares the cluster's CPUs between the replicas.
        health_interval: seconds between the controller's looks at each replica.
        health_timeout: seconds without an answer to such a look after which a replica is replaced.
        hang_timeout: seconds that one forward pass may take before its replica is replaced.
        startup_timeout: seconds that a replica may take to load and prove its teacher, once it has a place.
        client_timeout: seconds of silence after which a client is taken for dead and what it queued is dropped.
        idle_seconds: under ``replicas=(min, max)``, how long the pool must be idle before it shrinks by one.
        busy_seconds: under ``replicas=(min, max)``, the queue wait above which the pool grows by one.
        drain_timeout: seconds that a replica being removed may take to finish what it holds.

    Raises:
        ConfigError: names the option, the rule and the value.
    """

    max_batch: int = 32
    batching: Batching = "exact"
    max_wait: float = 0.005
    max_queued: int = 256
    max_queued_bytes: int = 2 * 2**30
    window: int = 3
    threads: int | None = None
    health_interval: float = 1.0
    health_timeout: float = 10.0
    hang_timeout: float = 60.0
    startup_timeout: float = 300.0
    client_timeout: float = 30.0
    idle_seconds: float = 30.0
    busy_seconds: float = 0.5
    drain_timeout: float = 60.0

    @classmethod
    def of(cls, options: Mapping[str, object]) -> PoolOptions:
        """``options`` by name; a name that does not exist raises ConfigError, with the nearest that does."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f" (options: {', '.join(known)})"
                raise ConfigError(f"{name!r} is not an option of a pool{hint}")
        return cls(**options)  # type: ignore[arg-type] # each value is checked in __post_init__

    def __post_init__(self) -> None:
        if self.batching not in get_args(Batching):
            raise ConfigError(f"batching must be one of {', '.join(get_args(Batching))}; got {self.batching!r}")
        for name in ("max_batch", "max_queued", "max_queued_bytes", "window"):
            _require(name, getattr(self, name), whole=True)
        if self.threads is not None:
            _require("threads", self.threads, whole=True)
        for name in (
            "health_interval",
            "health_timeout",
            "hang_timeout",
            "startup_timeout",
            "client_timeout",
            "idle_seconds",
            "busy_seconds",
            "drain_timeout",
        ):
            _require(name, getattr(self, name), whole=False)
        number = isinstance(self.max_wait, (int, float)) and not isinstance(self.max_wait, bool)
        if not (number and 0 <= self.max_wait < math.inf):
            raise ConfigError(f"max_wait must be at least 0 seconds, and finite; got {self.max_wait!r}")


def _require(name: str, value: object, *, whole: bool) -> None:
    kind = int if whole else (int, float)
    rule = "a whole number, at least 1" if whole else "more than 0 seconds, and finite"
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be {rule}; got {value!r}")


def parse_replicas(replicas: object, *, auto: int) -> tuple[int, int]:
    """``replicas`` as (min, max); ``auto`` is what ``"auto"`` stands for here.

    Raises:
        ConfigError: if it is neither a positive whole number, ``"auto"``, nor (min, max) with 1 <= min <= max.
    """
    if replicas == "auto":
        return auto, auto
    if isinstance(replicas, int) and not isinstance(replicas, bool) and replicas >= 1:
        return replicas, replicas
    if isinstance(replicas, (tuple, list)) and len(replicas) == 2:
        low, high = replicas
        if type(low) is type(high) is int:  # a bool is no count
            if 1 <= low <= high:
                return low, high
            if low >= 1:
                raise ConfigError(f"replicas=(min, max): max ({high}) must be >= min ({low})")
    raise ConfigError(f'replicas must be a whole number >= 1, "auto", or (min, max) with min >= 1; got {replicas!r}')
