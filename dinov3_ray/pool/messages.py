"""What clients, replicas and the controller send each other.

Plain frozen dataclasses. They are pickled with every request, so they hold no tensors: those cross separately, as NumPy
arrays (see ``transport.wire``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov3_ray.config.preprocessing import Preprocessing, Size, ViewSize
from dinov3_ray.pool.spec import PoolOptions

if TYPE_CHECKING:  # it loads torch, which the controller has no use for
    from dinov3_ray.features import FeatureSpec

__all__ = [
    "Answer",
    "FeatureLayout",
    "ImageLayout",
    "MemberState",
    "Outcome",
    "PoolView",
    "ReplicaLoad",
    "ReplicaStatistics",
    "ReplicaView",
    "RequestHeader",
    "StageSeconds",
    "TeacherInfo",
]


ImageLayout = tuple[str, bool]
"""(dtype, stacked): torch's name of the images' dtype, and whether they are one [B,3,H,W] array or one array each."""

FeatureLayout = tuple[tuple[str, str, str, bool, bool], ...]
"""One (name, dtype on the wire, dtype of the result, has scales, channels_last) for each output.

Scales follow their values. A map in channels_last order crosses as [B, h, w, D], without a permutation.
"""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class RequestHeader:
    """One part of one batch, as a replica receives it. Its images cross separately."""

    request_id: str
    client_id: str
    spec: FeatureSpec
    images: ImageLayout
    rows: int
    #: Replicas died while they held this request. It runs alone, and the replica records that it begins it.
    suspect: bool = False
    #: It was sent before and not answered. It goes to the front of the queue.
    urgent: bool = False
    #: Images that wait at the client, for autoscaling.
    backlog: int = 0


class Outcome(StrEnum):
    """How a replica answers a request."""

    DONE = "done"
    #: The teacher raised ``Answer.error``.
    FAILED = "failed"
    #: Not taken: the queue is full (come back after ``Answer.retry_after``).
    FULL = "full"
    #: Not taken, or dropped: the replica is being removed.
    DRAINING = "draining"
    #: Taken, and dropped again because its client was thought dead.
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """Images that wait at a replica when it answers."""

    rows: int = 0
    #: Those of ``rows`` that the answered client has sent, so that it does not count them twice.
    own_rows: int = 0


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """How long a request took at the replica, by stage.

    ``total`` runs from its arrival until its answer was ready. Requests that share a forward pass are charged a share
    of its time each, so ``total`` may exceed the sum of the stages.
    """

    queue: float = 0.0
    preprocess: float = 0.0
    forward: float = 0.0
    pack: float = 0.0
    total: float = 0.0

    @property
    def busy(self) -> float:
        """Seconds of the device thread that this request is charged."""
        return self.preprocess + self.forward + self.pack


@dataclass(frozen=True, slots=True)
class Answer:
    """A replica's answer. The result's arrays cross separately."""

    outcome: Outcome
    layout: FeatureLayout = ()
    fingerprint: str | None = None
    load: ReplicaLoad = field(default_factory=ReplicaLoad)
    seconds: StageSeconds = field(default_factory=StageSeconds)
    retry_after: float = 0.0
    error: BaseException | None = None
    #: The teacher's own traceback, as text: tracebacks do not survive pickling.
    trace: str = ""


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """What a client must know of the teacher to check images before it sends them, and to estimate sizes of results."""

    fingerprint: str | None = None
    origin: str | None = None
    description: str = ""
    patch_size: int = 1
    hidden_size: int | None = None
    has_cls: bool = True
    num_register_tokens: int | None = None
    depth: int | None = None
    image_size: Size | ViewSize | None = None
    grid_size: Size | None = None
    dtype: str | None = None
    computed_in: str | None = None
    compiled: bool | None = None
    device: str = "cpu"
    golden_cosine: float | None = None
    preprocessing: Preprocessing | None = None
    license: str | None = None


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica as clients see it. ``actor`` is what a transport sends to: a Ray actor handle or a local replica."""

    replica_id: str
    actor: Any
    node_id: str
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class PoolView:
    """The pool as clients see it. A view with a higher ``epoch`` replaces one with a lower."""

    epoch: int
    replicas: tuple[ReplicaView, ...]
    options: PoolOptions
    info: TeacherInfo | None
    target: int
    closed: bool = False
    #: Why it is closed, in words; empty if somebody shut it down.
    why_closed: str = ""
    #: Why replicas are missing, newest last, for the error that a waiting client may have to raise.
    recent_errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaStatistics:
    """A replica's counters since it started, and its current load.

    Where forward passes overlap, time is charged to the oldest one in flight only, so that the stages' sum is the time
    that the device was busy.

    Attributes:
        uptime: seconds since the replica started.
        batches: forward passes.
        preprocess_seconds: of teachers that report it (by an attribute ``preprocess_seconds``, or
            ``preprocess_watch`` on a CUDA device); for others it is part of ``forward_seconds``.
        errors_in_a_row: requests that raised since the last one that was answered. A request counts once, however
            often it was sent: one bad request does not make a bad replica. What is wrong with the request itself does
            not count, nor does an image that does not fit the device's memory.
        rejected: requests refused because the queue was full.
        out_of_memory: passes for which the device's memory did not suffice; each was computed again in smaller parts.
        fitting_batch: images in the smallest parts that batches are computed in since then; 0 if all fit whole.
        waiting, waiting_rows: requests in the queue, and their images.
        clients_backlog: images that clients hold back, of the client that reported most.
        oldest_wait: seconds that the oldest request in the queue has waited.
        busy_for: seconds since the oldest forward pass in flight became the oldest.
    """

    uptime: float = 0.0
    images: int = 0
    batches: int = 0
    queue_seconds: float = 0.0
    preprocess_seconds: float = 0.0
    forward_seconds: float = 0.0
    pack_seconds: float = 0.0
    errors: int = 0
    errors_in_a_row: int = 0
    rejected: int = 0
    out_of_memory: int = 0
    fitting_batch: int = 0
    waiting: int = 0
    waiting_rows: int = 0
    clients_backlog: int = 0
    oldest_wait: float = 0.0
    busy_for: float = 0.0

    @property
    def busy_seconds(self) -> float:
        """Seconds that the device spent on requests that were answered."""
        return self.preprocess_seconds + self.forward_seconds + self.pack_seconds


class MemberState(StrEnum):
    """The state of a replica."""

    STARTING = "starting"  # waits for Ray to place it, then loads and checks its teacher
    READY = "ready"
    DRAINING = "draining"  # finishes its requests and takes no others
