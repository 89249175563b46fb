"""The knobs of a pool, checked once, with the reason for each default.

What a pool serves: a DINOv3 configuration, or a factory of any teacher.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from dinov3_ray.config import DinoV3Config
from dinov3_ray.errors import ConfigError
from dinov3_ray.teacher import Extractor

__all__ = [
    "Batching",
    "CheckedSource",
    "Placement",
    "PoolOptions",
    "ReplicaCount",
    "TeacherSource",
    "builder",
    "check_source",
    "parse_replicas",
]


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


CheckedSource = DinoV3Config | Callable[[], Extractor]
TeacherSource = CheckedSource | str | os.PathLike[str]


def check_source(source: TeacherSource) -> CheckedSource:
    """``source`` as a configuration (read and validated here and now) or a factory.

    Raises:
        ConfigError: if it is neither.
    """
    if isinstance(source, DinoV3Config):
        return source
    if isinstance(source, (str, os.PathLike)):
        return DinoV3Config(root=Path(source))
    if callable(source):
        return source
    raise ConfigError(
        "teacher must be a DinoV3Config, a checkpoint directory, or a callable without arguments that returns an "
        f"object with .extract(images, spec); got {source!r}"
    )


def builder(source: CheckedSource, device: str) -> Callable[[], Extractor]:
    """What makes the teacher on ``device`` (a factory chooses its device itself)."""

    def build() -> Extractor:
        if isinstance(source, DinoV3Config):
            # Only here: transformers takes seconds to import, and neither a client nor a factory needs it.
            from dinov3_ray.model import DinoV3Teacher

            return DinoV3Teacher(source, device)
        teacher = source()
        if not isinstance(teacher, Extractor):
            raise ConfigError(f"the factory must return an object with .extract(images, spec); got {teacher!r}")
        return teacher

    return build


@dataclass(frozen=True, slots=True)
class Placement:
    """What each replica asks of the cluster.

    Args:
        num_gpus: GPUs a replica; a fraction shares one.
        num_cpus: CPUs that a replica reserves; 0 reserves none.
        label_selector: node labels that a replica needs, such as ``{"ray.io/accelerator-type": "H200"}``.

    Raises:
        ConfigError: a negative number, or more than one GPU but not a whole number of them.
    """

    num_gpus: float = 0
    num_cpus: float = 0
    label_selector: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_gpus", "num_cpus"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ConfigError(f"{name} must be a number >= 0; got {value!r}")
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ConfigError(f"num_gpus above 1 must be a whole number; got {self.num_gpus!r}")

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus > 0 else "cpu"

    def actor_options(self) -> dict[str, object]:
        """As options of a Ray actor."""
        options: dict[str, object] = {"num_gpus": self.num_gpus, "num_cpus": self.num_cpus}
        if self.label_selector:
            options["label_selector"] = dict(self.label_selector)
        return options

    def __str__(self) -> str:
        parts = [f"{self.num_gpus:g} GPU" if self.num_gpus else "", f"{self.num_cpus:g} CPU" if self.num_cpus else ""]
        parts += [f"label {key}={value}" for key, value in self.label_selector.items()]
        return ", ".join(part for part in parts if part) or "no reserved resources"
