"""A replica: one teacher, one queue, one thread that does all of its device work.

Ray-free: the actor in ``actor.py`` and local mode drive the same class. All work on the device happens on the
thread that built the teacher, because CUDA work from several threads of one actor has crashed and leaked (ray issues
33982, 49360). A second thread waits for results, looks at them and packs them, so that the device need not wait for
that.

Two faults are the device's, and not a request's. If its memory does not suffice, the first thread waits until nothing
else is in flight and computes the requests again, in parts if need be (``fitting_pipeline.py``). If this process can
no longer use it, the replica is over: its process ends, or, where it must not, every request from then on is an error.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch

from dinov3_ray.errors import DeviceLostError, DeviceMemoryError, InputError, PoolClosedError, SpecError, first_line
from dinov3_ray.images import ImageBatch
from dinov3_ray.model.device import settle_thread
from dinov3_ray.pool.messages import (
    Answer,
    Array,
    Outcome,
    ReplicaLoad,
    ReplicaStatistics,
    RequestHeader,
    StageSeconds,
    TeacherInfo,
)
from dinov3_ray.pool.replica.device_fault import DeviceFault, device_fault, drop_frames
from dinov3_ray.pool.replica.device_pipeline import (
    DevicePass,
    DevicePipeline,
    Results,
    inspect_teacher,
    join_batches,
    pipeline_for,
)
from dinov3_ray.pool.replica.fitting_pipeline import FittingPipeline
from dinov3_ray.pool.replica.queue import BatchQueue, Done, QueuedRequest
from dinov3_ray.pool.spec import PoolOptions
from dinov3_ray.pool.transport.wire import unpack_images
from dinov3_ray.teacher import Extractor

__all__ = ["Replica"]

log = logging.getLogger("dinov3_ray")

_FAILING = 100  # names of requests that raised: more say nothing more


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """Requests that are computed together; with ``scarce``, after the device's memory did not suffice for them."""

    requests: list[QueuedRequest]
    scarce: bool = False

    @property
    def suspect(self) -> bool:
        return any(request.header.suspect for request in self.requests)


class Replica:
    """Serves one teacher.

    Args:
        replica_id: its name in the pool.
        build: makes the teacher; called once, on the device thread.
        options: the pool's.
        unnamed: the fingerprint that a teacher without one gets, or a reload could mix two teachers unnoticed.
        threads: CPU threads to compute with; None leaves torch's setting alone (it is the whole process's).
        on_suspect: called on the device thread just before a request runs that earlier replicas died with.
        on_device_lost: called with the reason as soon as this process can no longer use the device, on the thread that
            finds out; it ends the process. None lets a replica live on that answers all with DeviceLostError.
        pipeline: makes what runs the teacher's passes; called once, on the device thread.

    It knows nothing of Ray, of other replicas, or of who its clients are beyond their names.
    """

    def __init__(
        self,
        replica_id: str,
        build: Callable[[], Extractor],
        options: PoolOptions,
        *,
        unnamed: str | None = None,
        threads: int | None = None,
        on_suspect: Callable[[str], None] | None = None,
        on_device_lost: Callable[[str], None] | None = None,
        pipeline: Callable[[Extractor], DevicePipeline] = pipeline_for,
    ) -> None:
        self.replica_id = replica_id
        self._started = time.monotonic()
        self.loaded: Future[TeacherInfo] = Future()
        self._build = build
        self._options = options
        self._unnamed = unnamed
        self._threads = threads
        self._on_suspect = on_suspect
        self._on_device_lost = on_device_lost
        self._make_pipeline = pipeline
        self._queue = BatchQueue(
            options.batching,
            max_batch=options.max_batch,
            max_wait=options.max_wait,
            max_requests=options.max_queued,
            max_bytes=options.max_queued_bytes,
        )
        self._changed = threading.Condition()
        self._counters = ReplicaStatistics()
        self._failing: set[str] = set()
        self._backlog: dict[str, int] = {}
        self._again: deque[_Job] = deque()  # what failed because of others, or for lack of memory
        self._running: list[_Job] = []  # what was taken up and is not answered yet
        self._alone = False  # what runs is a suspect: nothing else may run with it
        self._busy_since: float | None = None  # when the oldest pass in flight became the oldest
        self._in_flight: deque[tuple[_Job, DevicePass, float]] = deque()  # what the device was given, and when
        self._draining = False
        self._stopped = False
        self._device: object = None  # the teacher's, if it has one
        self._lost = ""  # why the device is lost
        self._ending = False  # whether a thread ends the process for it
        self._info = TeacherInfo()
        self._thread = threading.Thread(target=self._run, name=f"dinov3-{replica_id}", daemon=True)
        self._finisher = threading.Thread(target=self._finish_passes, name=f"dinov3-{replica_id}-results", daemon=True)

    # Control --------------------------------------------------------------------------------------------------------

    def start(self) -> Future[TeacherInfo]:
        """Build and prove the teacher on the device thread; the future describes it, or holds the error."""
        self._thread.start()
        return self.loaded

    def drain(self) -> None:
        """Refuse new requests."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    @property
    def draining(self) -> bool:
        """Whether it refuses new requests."""
        return self._draining

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing is queued or computed; False if that took longer than ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._queue or self._again or self._running), timeout)

    def stop(self, timeout: float = 5.0) -> None:
        """Answer what is queued as dropped and end the threads (they are daemons: hung ones are left behind)."""
        with self._changed:
            self._draining = self._stopped = True
            dropped = [*self._queue.clear(), *(request for job in self._again for request in job.requests)]
            self._again.clear()
            self._changed.notify_all()
        for request in dropped:
            request.done(Answer(Outcome.DRAINING), [])
        for thread in (self._thread, self._finisher):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(timeout)

    def forget(self, client_id: str) -> int:
        """Drop what a client that is gone has queued; returns how many requests that were."""
        with self._changed:
            dropped = self._queue.forget(client_id)
            self._backlog.pop(client_id, None)
            self._changed.notify_all()
        for request in dropped:
            request.done(Answer(Outcome.DROPPED), [])
        return len(dropped)

    def statistics(self) -> ReplicaStatistics:
        now = time.monotonic()
        with self._changed:
            oldest = self._queue.oldest()
            return replace(
                self._counters,
                errors_in_a_row=len(self._failing),
                uptime=now - self._started,
                waiting=len(self._queue),
                waiting_rows=self._queue.rows(),
                clients_backlog=sum(self._backlog.values()),
                oldest_wait=0.0 if oldest is None else now - oldest,
                busy_for=0.0 if self._busy_since is None else now - self._busy_since,
            )

    def __repr__(self) -> str:
        state = "stopped" if self._stopped else "draining" if self._draining else "lost" if self._lost else "serving"
        if not self.loaded.done():
            state = "loading"
        return f"<Replica {self.replica_id} {state}, {self._queue!r}>"

    # Requests -------------------------------------------------------------------------------------------------------

    def offer(self, header: RequestHeader, arrays: Sequence[Array], done: Done) -> None:
        """Queue a request; ``done(answer, arrays)`` is called exactly once, on one of the replica's threads or at once.

        The arrays of the request are read, never written, until then.
        """
        request = QueuedRequest(header, arrays, done, time.monotonic())
        with self._changed:
            if self._draining:
                refusal = Answer(Outcome.DRAINING)
            elif self._queue.offer(request):
                self._backlog[header.client_id] = header.backlog
                self._changed.notify_all()
                return
            else:
                self._count(rejected=1)
                refusal = Answer(Outcome.FULL, load=self._load(header), retry_after=self._retry_after())
        done(refusal, [])

    def _load(self, header: RequestHeader) -> ReplicaLoad:
        return ReplicaLoad(self._queue.rows(), self._queue.rows(header.client_id))

    def _retry_after(self) -> float:
        """About the time in which half of a full queue is worked off."""
        batches = max(self._counters.batches, 1)
        seconds = self._counters.preprocess_seconds + self._counters.forward_seconds
        return min(max(seconds / batches * len(self._queue) / 2, 0.01), 5.0)

    # The device thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._threads is not None:
                # OpenMP keeps this number by thread: it must be set on the one that computes.
                torch.set_num_threads(self._threads)
            teacher = self._build()
            self._device = getattr(teacher, "device", None)
            settle_thread(self._device)
            info = inspect_teacher(teacher, self._options.max_batch)
            pad_to = self._options.max_batch if self._options.batching == "deterministic" else 1
            self._pipeline = FittingPipeline(self.replica_id, self._make_pipeline(teacher), pad_to=pad_to)
            self._warm_up(teacher)
            self._info = replace(info, fingerprint=info.fingerprint or self._unnamed)
            if self._stopped:
                raise PoolClosedError(f"replica {self.replica_id} was stopped before it was ready")
        except BaseException as error:  # noqa: BLE001 - whatever a user's factory raises is the reason to report
            if device_fault(error) is DeviceFault.LOST:
                # Whoever asked for this replica ends its process, once it has the reason.
                error = self._device_lost(first_line(error), error)
            self.loaded.set_exception(error)
            return
        self._finisher.start()
        self.loaded.set_result(self._info)
        while job := self._next_job():
            self._begin(job)
            del job  # with its images, which would lie in the object store until the next one comes

    def _warm_up(self, teacher: Extractor) -> None:
        """Run what the teacher names, in the way of requests, so that these find all memory and code in place."""
        passes = getattr(teacher, "warm_up_passes", None)
        for images, spec in passes(self._options.max_batch) if callable(passes) else ():
            shortages = self._pipeline.warm_up(ImageBatch.of(images), spec)
            with self._changed:
                self._count_shortages(shortages)

    def _next_job(self) -> _Job | None:
        """What to begin next, as soon as the device may be given it; nothing at the end."""
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                next_look = None
                if len(self._running) < (1 if self._alone else self._pipeline.depth):
                    job = self._take(now)
                    if isinstance(job, _Job):
                        self._alone = job.suspect
                        if self._alone:
                            self._changed.wait_for(lambda: not self._running)  # it would die with this one
                            now = time.monotonic()
                        if not self._running:
                            self._busy_since = now
                        self._running.append(job)
                        return job
                    next_look = job
                self._changed.wait(None if next_look is None else next_look - now)
            return None

    def _take(self, now: float) -> _Job | float | None:
        """The next job; or the time until which to wait for company; or None if nothing waits."""
        if self._again:
            return self._again.popleft()
        taken = self._queue.take(now)
        return _Job(taken) if isinstance(taken, list) else taken

    def _begin(self, job: _Job) -> None:
        """Give the device the pass of ``job``; or compute it here, if it may be more than fits the device."""
        begun = time.monotonic()
        try:
            self._require_device()
            for request in job.requests:
                if request.header.suspect and self._on_suspect is not None:
                    self._on_suspect(request.header.request_id)
            batch = join_batches([unpack_images(request.header.images, request.arrays) for request in job.requests])
            spec = job.requests[0].header.spec
            if not job.scarce and self._pipeline.fits(batch, spec):
                run = self._pipeline.begin(batch, spec)
                with self._changed:
                    self._in_flight.append((job, run, begun))
                    self._changed.notify_all()
                return
            with self._changed:
                self._changed.wait_for(lambda: self._running == [job])
            self._require_device()  # what was in flight may have lost it
            begun = time.monotonic()
            parts = self._pipeline.compute(batch, spec, after_shortage=job.scarce)
        except Exception as error:  # noqa: BLE001 - a teacher may raise anything, and the replica lives on
            self._fail(job, error)
        else:
            with self._changed:
                self._count_shortages(parts.shortages)
            self._answer(job, parts.results, begun, parts.passes)
        self._end(job)

    # The thread for results -----------------------------------------------------------------------------------------

    def _finish_passes(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        settle_thread(self._device)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._in_flight or (self._stopped and not self._running))
                if not self._in_flight:
                    return
                job, run, begun = self._in_flight.popleft()
            self._finish(job, run, begun)
            del run  # with what it held on the device, which others may wait for
            self._end(job)
            del job

    def _finish(self, job: _Job, run: DevicePass, begun: float) -> None:
        """Wait for the pass of ``job``, and answer its requests."""
        try:
            results = run.result()
        except Exception as error:  # noqa: BLE001 - the teacher's results may raise anything too
            self._fail(job, error)
        else:
            self._answer(job, results, begun)

    def _end(self, job: _Job) -> None:
        with self._changed:
            self._running.remove(job)
            self._busy_since = time.monotonic() if self._running else None
            # A client with more to send keeps something here: one that does not has no backlog any more.
            here = {request.header.client_id for one in self._running for request in one.requests}
            self._backlog = {
                client: rows for client, rows in self._backlog.items() if client in here or self._queue.rows(client)
            }
            self._changed.notify_all()

    def _answer(self, job: _Job, results: Results, begun: float, passes: int = 1) -> None:
        now = time.monotonic()
        assert self._busy_since is not None
        busy = max(now - max(self._busy_since, begun), 0.0)  # another pass may have failed since
        preprocess = min(results.preprocess, busy)
        pack = min(results.pack, busy - preprocess)
        rows = sum(request.header.rows for request in job.requests)
        first = 0
        for request in job.requests:
            share = request.header.rows / rows
            seconds = StageSeconds(
                queue=begun - request.arrived,
                preprocess=preprocess * share,
                forward=(busy - preprocess - pack) * share,
                pack=pack * share,
                total=now - request.arrived,
            )
            with self._changed:
                self._failing.clear()
                self._count(
                    images=request.header.rows,
                    queue_seconds=seconds.queue,
                    preprocess_seconds=seconds.preprocess,
                    forward_seconds=seconds.forward,
                    pack_seconds=seconds.pack,
                )
                load = self._load(request.header)
            last = first + request.header.rows
            arrays = [array[first:last] for array in results.arrays]
            first = last
            fingerprint = results.fingerprint or self._info.fingerprint
            request.done(Answer(Outcome.DONE, results.layout, fingerprint, load, seconds), arrays)
        with self._changed:
            self._count(batches=passes)

    def _fail(self, job: _Job, error: Exception) -> None:
        """Answer ``job`` with ``error``; or compute it again, where that may be better than a failure."""
        fault = device_fault(error)
        if fault is DeviceFault.MEMORY:
            with self._changed:
                self._count_shortages(1)
        if fault is DeviceFault.LOST:
            error = self._lose_device(error)
        elif fault is DeviceFault.MEMORY and not job.scarce and not isinstance(error, DeviceMemoryError):
            drop_frames(error)
            self._repeat([_Job([request], scarce=True) for request in job.requests])
            return
        elif len(job.requests) > 1:
            # One request's fault must not be its neighbours': each runs by itself.
            self._repeat([_Job([request]) for request in job.requests])
            return
        trace = "".join(traceback.format_exception(error))
        drop_frames(error)
        for request in job.requests:
            with self._changed:
                self._count(errors=1)
                # What the caller did wrong says nothing of this replica's health, nor does an image that is too large.
                of_the_request = isinstance(error, (InputError, SpecError, DeviceMemoryError))
                if not of_the_request and len(self._failing) < _FAILING:
                    self._failing.add(request.header.request_id)
                load = self._load(request.header)
            request.done(Answer(Outcome.FAILED, load=load, error=error, trace=trace), [])

    def _repeat(self, again: list[_Job]) -> None:
        """Have the device thread compute ``again`` next; or hand it back at the end."""
        with self._changed:
            stopped = self._stopped
            if not stopped:
                self._again.extend(again)
        for request in (request for job in again for request in job.requests) if stopped else ():
            request.done(Answer(Outcome.DRAINING), [])

    # The device's faults --------------------------------------------------------------------------------------------

    def _lose_device(self, error: BaseException) -> DeviceLostError:
        """End the process, or take note that the device is lost, and give the error for whoever asks it for more."""
        with self._changed:
            first, self._lost = not self._lost, self._lost or first_line(error)
            self._ending = self._ending or (first and self._on_device_lost is not None)
        if first:
            log.critical("replica %s has lost its device: %s", self.replica_id, self._lost)
            if self._on_device_lost is not None:
                self._on_device_lost(self._lost)
                with self._changed:
                    self._ending = False
                    self._changed.notify_all()
        self._wait_for_end()
        return self._device_lost(self._lost, error)

    def _require_device(self) -> None:
        self._wait_for_end()
        if self._lost:
            raise self._device_lost(self._lost)

    def _wait_for_end(self) -> None:
        """Answer nothing while another thread ends the process: what it leaves open is computed elsewhere."""
        with self._changed:
            self._changed.wait_for(lambda: not self._ending)

    def _device_lost(self, reason: str, cause: BaseException | None = None) -> DeviceLostError:
        error = DeviceLostError(
            f"replica {self.replica_id} must end with its process, which can no longer use its device: {reason} (start "
            "the process again; a pool in Ray does that by itself)"
        )
        error.__cause__ = cause
        return error

    def _count_shortages(self, number: int) -> None:
        """Count passes that ran out of memory; holding the lock is the caller's part."""
        self._count(out_of_memory=number)
        self._counters = replace(self._counters, fitting_batch=self._pipeline.fitting_batch)

    def _count(self, **more: float) -> None:
        """Add to the counters; holding the lock is the caller's part."""
        self._counters = replace(self._counters, **{name: getattr(self._counters, name) + more[name] for name in more})
