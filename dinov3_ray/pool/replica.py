"""A replica: one teacher, one queue, one thread that does all of its device work.

Ray-free: the actor in ``replica_actor`` and local mode drive the same class. All work on the device happens on the
thread that built the teacher, because CUDA work from several threads of one actor has crashed and leaked (ray issues
33982, 49360).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch

from dinov3_ray.errors import InputError, PoolClosedError, SpecError
from dinov3_ray.pool.batching import BatchQueue, Waiting
from dinov3_ray.pool.messages import Answer, Load, Outcome, RequestHeader, StageSeconds, TeacherInfo
from dinov3_ray.pool.options import PoolOptions
from dinov3_ray.pool.passes import describe, join, pad, run
from dinov3_ray.pool.wire import Array, pack_features, unpack_images
from dinov3_ray.teacher import Extractor

__all__ = ["Replica", "ReplicaStatistics"]

log = logging.getLogger("dinov3_ray")

_FAILING = 100  # names of requests that raised: more say nothing more

Done = Callable[[Answer, list[Array]], None]


@dataclass(frozen=True, slots=True)
class ReplicaStatistics:
    """Counters since the replica started, ``uptime`` seconds ago, and how it stands now.

    ``batches`` counts forward passes; ``errors_in_a_row`` the requests that raised since one was answered, each once
    however often it was sent (one bad request is no sign of a bad replica). ``preprocess_seconds`` is known of teachers
    that tell it in an attribute ``preprocess_seconds``, as the local one does; of others it is part of
    ``forward_seconds``.
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
        """What the device thread has spent on requests that were answered."""
        return self.preprocess_seconds + self.forward_seconds + self.pack_seconds


@dataclass(slots=True)
class _Job:
    header: RequestHeader
    arrays: Sequence[Array]
    done: Done
    arrived: float


@dataclass(slots=True)
class _Counters:
    images: int = 0
    batches: int = 0
    queue_seconds: float = 0.0
    preprocess_seconds: float = 0.0
    forward_seconds: float = 0.0
    pack_seconds: float = 0.0
    errors: int = 0
    failing: set[str] = field(default_factory=set)
    rejected: int = 0
    backlog: dict[str, int] = field(default_factory=dict)


class Replica:
    """Serves one teacher.

    Args:
        replica_id: its name in the pool.
        build: makes the teacher; called once, on the device thread.
        options: the pool's.
        generation: counts the pool's reloads.
        threads: CPU threads to compute with; None leaves torch's setting alone (it is the whole process's).
        on_suspect: called on the device thread just before a request runs that earlier replicas died with.

    It knows nothing of Ray, of other replicas, or of who its clients are beyond their names.
    """

    def __init__(
        self,
        replica_id: str,
        build: Callable[[], Extractor],
        options: PoolOptions,
        *,
        generation: int = 0,
        threads: int | None = None,
        on_suspect: Callable[[str], None] | None = None,
    ) -> None:
        self.replica_id = replica_id
        self._started = time.monotonic()
        self.loaded: Future[TeacherInfo] = Future()
        self._build = build
        self._options = options
        self._generation = generation
        self._threads = threads
        self._on_suspect = on_suspect
        self._queue = BatchQueue(
            options.batching,
            max_batch=options.max_batch,
            max_wait=options.max_wait,
            max_requests=options.max_queued,
            max_bytes=options.max_queued_bytes,
        )
        self._jobs: dict[int, _Job] = {}
        self._tickets = itertools.count()
        self._changed = threading.Condition()
        self._state = _Counters()
        self._busy_since: float | None = None
        self._draining = False
        self._stopped = False
        self._info = TeacherInfo()
        self._thread = threading.Thread(target=self._run, name=f"dinov3-{replica_id}", daemon=True)

    # Control --------------------------------------------------------------------------------------------------------

    def start(self) -> Future[TeacherInfo]:
        """Build and prove the teacher on the device thread; the future tells of it, or of why it failed."""
        self._thread.start()
        return self.loaded

    def drain(self) -> None:
        """Take no more requests."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    @property
    def draining(self) -> bool:
        """Whether it takes no more requests."""
        return self._draining

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing is queued or computed; False if that took longer than ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and self._busy_since is None, timeout)

    def stop(self, timeout: float = 5.0) -> None:
        """Answer what is queued as dropped and end the device thread (it is a daemon: a hung one is left behind)."""
        with self._changed:
            self._draining = self._stopped = True
            dropped = list(self._jobs.values())
            self._jobs.clear()
            self._changed.notify_all()
        for job in dropped:
            job.done(Answer(Outcome.DRAINING), [])
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def forget(self, client_id: str) -> int:
        """Drop what a client that is gone has queued; returns how many requests that were."""
        with self._changed:
            dropped = [self._jobs.pop(waiting.ticket) for waiting in self._queue.forget(client_id)]
            self._state.backlog.pop(client_id, None)
            self._changed.notify_all()
        for job in dropped:
            job.done(Answer(Outcome.DROPPED), [])
        return len(dropped)

    def statistics(self) -> ReplicaStatistics:
        now = time.monotonic()
        with self._changed:
            state, oldest = self._state, self._queue.oldest()
            return ReplicaStatistics(
                uptime=now - self._started,
                images=state.images,
                batches=state.batches,
                queue_seconds=state.queue_seconds,
                preprocess_seconds=state.preprocess_seconds,
                forward_seconds=state.forward_seconds,
                pack_seconds=state.pack_seconds,
                errors=state.errors,
                errors_in_a_row=len(state.failing),
                rejected=state.rejected,
                waiting=len(self._queue),
                waiting_rows=self._queue.rows(),
                clients_backlog=sum(state.backlog.values()),
                oldest_wait=0.0 if oldest is None else now - oldest,
                busy_for=0.0 if self._busy_since is None else now - self._busy_since,
            )

    def __repr__(self) -> str:
        state = "stopped" if self._stopped else "draining" if self._draining else "serving"
        if not self.loaded.done():
            state = "loading"
        return f"<Replica {self.replica_id} {state}, {self._queue!r}>"

    # Requests -------------------------------------------------------------------------------------------------------

    def offer(self, header: RequestHeader, arrays: Sequence[Array], done: Done) -> None:
        """Queue a request; ``done(answer, arrays)`` is called exactly once, on the device thread or at once.

        The arrays of the request are read, never written, until then.
        """
        now = time.monotonic()
        waiting = Waiting(
            ticket=next(self._tickets),
            client_id=header.client_id,
            key=(header.spec, header.images, tuple(array.shape[-3:] for array in arrays)),
            rows=header.rows,
            nbytes=sum(array.nbytes for array in arrays),
            arrived=now,
            urgent=header.urgent,
            alone=header.suspect,
        )
        with self._changed:
            if self._draining:
                refusal = Answer(Outcome.DRAINING)
            elif self._queue.offer(waiting):
                self._state.backlog[header.client_id] = header.backlog
                self._jobs[waiting.ticket] = _Job(header, arrays, done, now)
                self._changed.notify_all()
                return
            else:
                self._state.rejected += 1
                refusal = Answer(Outcome.FULL, load=self._load(header), retry_after=self._retry_after())
        done(refusal, [])

    def _load(self, header: RequestHeader) -> Load:
        return Load(self._queue.rows(), self._queue.rows(header.client_id))

    def _retry_after(self) -> float:
        """About the time in which half of a full queue is worked off."""
        batches = max(self._state.batches, 1)
        seconds = self._state.preprocess_seconds + self._state.forward_seconds
        return min(max(seconds / batches * len(self._queue) / 2, 0.01), 5.0)

    # The device thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._threads is not None:
                # OpenMP keeps this number by thread: it must be set on the one that computes.
                torch.set_num_threads(self._threads)
            teacher = self._build()
            info = describe(teacher)
            # A teacher that does not say who it is gets a name all the same, or a reload could mix two unnoticed.
            self._info = replace(info, fingerprint=info.fingerprint or f"generation-{self._generation}")
            if self._stopped:
                raise PoolClosedError(f"replica {self.replica_id} was stopped before it was ready")
        except BaseException as error:  # noqa: BLE001 - whatever a user's factory raises is the reason to report
            self.loaded.set_exception(error)
            return
        self.loaded.set_result(self._info)
        while (jobs := self._next_jobs()) is not None:
            self._compute(teacher, jobs)
            with self._changed:
                self._busy_since = None
                # A client with more to send keeps something here: one that does not has no backlog any more.
                backlog = self._state.backlog
                self._state.backlog = {client: rows for client, rows in backlog.items() if self._queue.rows(client)}
                self._changed.notify_all()

    def _next_jobs(self) -> list[_Job] | None:
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                batch = self._queue.take(now)
                if isinstance(batch, list):
                    self._busy_since = now
                    return [self._jobs.pop(waiting.ticket) for waiting in batch]
                self._changed.wait(None if batch is None else batch - now)
            return None

    def _compute(self, teacher: Extractor, jobs: list[_Job]) -> None:
        begun = time.monotonic()
        spec = jobs[0].header.spec
        try:
            for job in jobs:
                if job.header.suspect and self._on_suspect is not None:
                    self._on_suspect(job.header.request_id)
            batch = join([unpack_images(job.header.images, job.arrays) for job in jobs])
            rows = len(batch)
            if self._options.batching == "deterministic":
                batch = pad(batch, self._options.max_batch)
            features = run(teacher, batch, spec.native())
            computed = time.monotonic()
            stops = list(itertools.accumulate(job.header.rows for job in jobs))
            parts = [features.rows(stop - job.header.rows, stop) for job, stop in zip(jobs, stops, strict=True)]
            packed = [pack_features(part, spec) for part in parts]
        except Exception as error:  # noqa: BLE001 - a teacher may raise anything, and the replica lives on
            if len(jobs) > 1:
                # One request's fault must not be its neighbours': each runs by itself.
                for job in jobs:
                    self._compute(teacher, [job])
                return
            self._fail(jobs[0], error)
            return
        # Read after the results, which a device has to have finished: asking costs no wait.
        preprocess = min(getattr(teacher, "preprocess_seconds", 0.0), computed - begun)
        now = time.monotonic()
        for job, (layout, arrays) in zip(jobs, packed, strict=True):
            share = job.header.rows / rows
            seconds = StageSeconds(
                queue=begun - job.arrived,
                preprocess=preprocess * share,
                forward=(computed - begun - preprocess) * share,
                pack=(now - computed) * share,
                total=now - job.arrived,
            )
            with self._changed:
                self._count(job, seconds)
                load = self._load(job.header)
            fingerprint = features.fingerprint or self._info.fingerprint
            job.done(Answer(Outcome.DONE, layout, fingerprint, load, seconds), arrays)
        with self._changed:
            self._state.batches += 1

    def _count(self, job: _Job, seconds: StageSeconds) -> None:
        state = self._state
        state.images += job.header.rows
        state.queue_seconds += seconds.queue
        state.preprocess_seconds += seconds.preprocess
        state.forward_seconds += seconds.forward
        state.pack_seconds += seconds.pack
        state.failing.clear()

    def _fail(self, job: _Job, error: Exception) -> None:
        with self._changed:
            self._state.errors += 1
            # What the caller did wrong says nothing of this replica's health.
            if not isinstance(error, (InputError, SpecError)) and len(self._state.failing) < _FAILING:
                self._state.failing.add(job.header.request_id)
            load = self._load(job.header)
        trace = "".join(traceback.format_exception(error))
        # Frames would keep the batch's tensors alive, and do not survive pickling anyway.
        error = error.with_traceback(None)
        job.done(Answer(Outcome.FAILED, load=load, error=error, trace=trace), [])
