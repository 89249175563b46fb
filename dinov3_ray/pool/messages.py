"""What clients, replicas and the controller say to each other.

Plain frozen dataclasses: they are pickled with every request, so they hold no tensors (those travel beside them as
NumPy arrays, see ``wire``).


What a replica counts of its own work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov3_ray.config.preprocessing import Preprocessing
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

FeatureLayout = tuple[tuple[str, str, str, bool], ...]
"""One (name, dtype on the wire, dtype of the result, has scales) for each output; scales follow their values."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class RequestHeader:
    """One part of one batch, as a replica gets it. Its images travel beside it."""

    request_id: str
    client_id: str
    spec: FeatureSpec
    images: ImageLayout
    rows: int
    #: Replicas have died while they held this request: it runs alone, and the replica writes down that it begins it.
    suspect: bool = False
    #: It was sent before and not answered: it goes to the front of the queue.
    urgent: bool = False
    #: Rows that wait at the client for a free place: what autoscaling looks at.
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
    """What waits at a replica when it answers."""

    rows: int = 0
    #: Those of ``rows`` that belong to the client being answered, so that it does not count them twice.
    own_rows: int = 0


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Where a request's time at the replica went.

    ``total`` is from its arrival until its answer was ready. It is more than the sum of the others where the request
    shared its forward pass, since each is charged with its share of that.
    """

    queue: float = 0.0
    preprocess: float = 0.0
    forward: float = 0.0
    pack: float = 0.0
    total: float = 0.0

    @property
    def busy(self) -> float:
        """What the request kept the device thread busy."""
        return self.preprocess + self.forward + self.pack


@dataclass(frozen=True, slots=True)
class Answer:
    """A replica's answer. The result's arrays travel beside it."""

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
    """What a client must know of the teacher to check images before it sends them, and to size what comes back."""

    fingerprint: str | None = None
    description: str = ""
    patch_size: int = 1
    hidden_size: int | None = None
    num_register_tokens: int | None = None
    depth: int | None = None
    image_size: tuple[int, int] | None = None
    grid_size: tuple[int, int] | None = None
    dtype: str | None = None
    computed_in: str | None = None
    device: str = "cpu"
    golden_cosine: float | None = None
    preprocessing: Preprocessing | None = None


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica as clients see it. ``actor`` is what a transport sends to: a Ray actor handle or a local replica."""

    replica_id: str
    actor: Any
    node_id: str
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class PoolView:
    """The pool as clients see it; a higher ``epoch`` replaces a lower one."""

    epoch: int
    replicas: tuple[ReplicaView, ...]
    options: PoolOptions
    info: TeacherInfo | None
    target: int
    closed: bool = False
    #: Why replicas are missing, newest last, for the error that a waiting client may have to raise.
    recent_errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaStatistics:
    """Counters since the replica started, ``uptime`` seconds ago, and how it stands now.

    ``batches`` counts forward passes; ``errors_in_a_row`` the requests that raised since one was answered, each once
    however often it was sent (one bad request is no sign of a bad replica). ``preprocess_seconds`` is known of teachers
    that tell it in an attribute ``preprocess_seconds`` (on a CUDA device, ``preprocess_watch``), as the local one does;
    of others it is part of ``forward_seconds``. Where passes overlap, none is charged with the time in which another
    was ahead of it, so that the stages' sum is what the device was busy. ``busy_for`` is how long the pass that is
    ahead of all others has been so.
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
    waiting: int = 0
    waiting_rows: int = 0
    clients_backlog: int = 0
    oldest_wait: float = 0.0
    busy_for: float = 0.0

    @property
    def busy_seconds(self) -> float:
        """What the device has spent on requests that were answered."""
        return self.preprocess_seconds + self.forward_seconds + self.pack_seconds


class MemberState(StrEnum):
    STARTING = "starting"  # waits for its place, loads and proves its teacher
    READY = "ready"
    DRAINING = "draining"  # finishes what it holds and takes no more
