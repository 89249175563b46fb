"""The Ray actor around a replica: one pool of threads for requests, another for health and control.

Threads, not coroutines: a request waits for the device in its own thread, because Ray takes about a third less time to
run a method in a thread than in an event loop, and writes the results of several requests to the object store at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING

import ray
from ray import cloudpickle

from dinov3_ray.config.hub import arrived_bytes
from dinov3_ray.errors import ReplicaError
from dinov3_ray.machine.cpus import usable_cpus
from dinov3_ray.pool.cluster import naming_node, process_start
from dinov3_ray.pool.kv import PoolKV
from dinov3_ray.pool.messages import Answer, MemberState, Outcome, ReplicaStatistics, TeacherInfo
from dinov3_ray.pool.metrics import Publisher, Sample
from dinov3_ray.pool.replica.gpu_memory import expand_segments, within_share
from dinov3_ray.pool.spec import PoolOptions, PoolSpec, builder
from dinov3_ray.pool.transport.actors import Reply, frame_answer, open_request
from dinov3_ray.teacher import Extractor

if TYPE_CHECKING:
    from dinov3_ray.pool.messages import Array

__all__ = ["ReplicaActor", "ReplicaProcess", "ReplicaSetup", "end_process", "read_replica", "thread_groups"]


_CONTROL_THREADS = 16
_REFUSING_THREADS = 16  # beyond those of a full queue: a request that is refused needs an answer too
_FAREWELL_SECONDS = 1.0  # for the reason of a process's end; a head that is away must not keep the process
_DEVICE_LOST = 70  # the exit code: an internal error, as in sysexits.h
_ANSWER_SECONDS = 0.05  # in which an answer leaves this process


@dataclass(frozen=True, slots=True)
class ReplicaSetup:
    """What a replica needs at its start."""

    replica_id: str
    generation: int
    namespace: str
    pool: str
    spec: PoolSpec
    threads: int | None


@dataclass(frozen=True, slots=True)
class ReplicaProcess:
    """Where a replica runs."""

    node_id: str
    pid: int
    #: The process's start time in clock ticks since boot, so that a process number used again is not mistaken for it.
    started: str
    generation: int


def thread_groups(options: PoolOptions) -> dict[str, int]:
    """Ray's concurrency groups for a replica: each queued request waits in its own thread, and requests must not keep
    health waiting.
    """
    return {"infer": options.max_queued + _REFUSING_THREADS, "control": _CONTROL_THREADS}


def end_process(reason: str) -> None:  # noqa: ARG001 - it is in the log
    """End this process at once, since it can no longer use its device.

    Whoever waits for it notices its death, and has its work done elsewhere. Nothing is cleaned up: that would ask the
    device again.
    """
    os._exit(_DEVICE_LOST)


class ReplicaActor:
    """A replica as a Ray actor, for ``ray.remote(concurrency_groups=thread_groups(options))``.

    Its constructor only takes notes, since Ray does not report why a constructor failed in a form that could be acted
    on: loading is a separate call, which returns the reason.
    """

    def __init__(self, setup: ReplicaSetup) -> None:
        # OpenMP reads it when torch is loaded, which happens here and in this process alone: its threads must sleep
        # while they wait. Spinning, they take the cores from Ray and from whatever else the node computes.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._kv = PoolKV(setup.namespace, setup.pool)
        node_id, pid = ray.get_runtime_context().get_node_id(), os.getpid()
        self._process = ReplicaProcess(node_id, pid, process_start(pid), setup.generation)
        self._kv.save_process(setup.replica_id, self._process)
        placement = setup.spec.placement
        expand_segments(placement.num_gpus, os.environ)
        from dinov3_ray.pool.replica.replica import (
            Replica,  # not above: the controller imports this module, without torch
        )

        self._setup = setup
        self._replica = Replica(
            setup.replica_id,
            self._build,
            setup.spec.options,
            unnamed=f"generation-{setup.generation}",
            # The controller shares the cluster's CPUs; this node, or this container, may have fewer.
            threads=None if setup.threads is None else min(setup.threads, usable_cpus()),
            on_suspect=lambda request_id: self._kv.begin_suspect(setup.replica_id, request_id),
            on_device_lost=self._end,
        )
        self._lock = threading.Lock()
        self._loading = False
        self._answering = 0
        self._publisher = Publisher(setup.pool, setup.replica_id)

    def _build(self) -> Extractor:
        """The teacher, unpickled only now: a class that this node lacks is a reason to report like any other."""
        spec = self._setup.spec
        with naming_node():
            return within_share(builder(spec.unpickled().given, spec.placement.device), spec.placement.num_gpus)()

    @ray.method(concurrency_group="control")
    def process(self) -> ReplicaProcess:
        return self._process

    @ray.method(concurrency_group="control")
    def load(self) -> TeacherInfo:
        """Build and prove the teacher, once; later calls wait for the same result."""
        with self._lock:
            first, self._loading = not self._loading, True
        if first:
            self._replica.start()
        return self._replica.loaded.result()

    @ray.method(concurrency_group="control")
    def downloaded(self) -> int | None:
        """Bytes of a model of the hub that is being downloaded; None if none is."""
        return arrived_bytes()

    @ray.method(concurrency_group="control")
    def state(self) -> MemberState:
        """What a controller that has just been restarted takes it for."""
        if self._replica.draining:
            return MemberState.DRAINING
        loaded = self._replica.loaded.done() and self._replica.loaded.exception() is None
        return MemberState.READY if loaded else MemberState.STARTING

    @ray.method(concurrency_group="control")
    def health(self) -> ReplicaStatistics:
        statistics = self._replica.statistics()
        self._publisher.publish(read_replica(statistics))
        return statistics

    @ray.method(concurrency_group="control")
    def forget(self, client_id: str) -> int:
        return self._replica.forget(client_id)

    @ray.method(concurrency_group="control")
    def drain(self, timeout: float) -> bool:
        self._replica.drain()
        idle = self._replica.wait_idle(timeout)
        while idle and self._answering:  # computed, but still on the way out
            time.sleep(_ANSWER_SECONDS)
        time.sleep(_ANSWER_SECONDS)
        return idle

    def _end(self, reason: str) -> None:
        """Leave the reason to the controller, if the head takes it soon, and end this process."""
        leaving = threading.Thread(target=self._kv.save_end, args=(self._setup.replica_id, reason), daemon=True)
        leaving.start()
        leaving.join(_FAREWELL_SECONDS)
        end_process(reason)

    @ray.method(concurrency_group="infer")
    def infer(self, message: bytes, *arrays: Array) -> Reply:
        header, given = open_request(message, arrays)
        answered: SimpleQueue[tuple[Answer, list[Array]]] = SimpleQueue()
        with self._lock:
            self._answering += 1
        try:
            self._replica.offer(header, given, lambda answer, results: answered.put((answer, results)))
            answer, results = answered.get()
            return frame_answer(_portable(answer) if answer.outcome is Outcome.FAILED else answer, results)
        finally:
            with self._lock:
                self._answering -= 1


def _portable(answer: Answer) -> Answer:
    """``answer`` with an error that the client can unpickle; one that cannot be pickled is described in words."""
    try:
        cloudpickle.loads(cloudpickle.dumps(answer.error))
    except Exception:  # noqa: BLE001 - pickling runs the error's own code, which may raise anything
        error = answer.error
        return replace(answer, error=ReplicaError(f"the teacher raised {type(error).__name__}: {error}"))
    return answer


def read_replica(statistics: ReplicaStatistics) -> Iterator[Sample]:
    yield Sample("dinov3_images", statistics.images)
    yield Sample("dinov3_batches", statistics.batches)
    yield Sample("dinov3_errors", statistics.errors)
    yield Sample("dinov3_rejected", statistics.rejected)
    yield Sample("dinov3_out_of_memory", statistics.out_of_memory)
    yield Sample("dinov3_fitting_batch", statistics.fitting_batch)
    yield Sample("dinov3_stage_seconds", statistics.queue_seconds, "queue")
    yield Sample("dinov3_stage_seconds", statistics.preprocess_seconds, "preprocess")
    yield Sample("dinov3_stage_seconds", statistics.forward_seconds, "forward")
    yield Sample("dinov3_stage_seconds", statistics.pack_seconds, "pack")
    yield Sample("dinov3_queued", statistics.waiting)
