"""The router: one thread that carries out what the routing table decides.

Callers hand it batches; answers and views come in from the transport's threads. All of them go through one queue to one
thread, so that the table needs no lock, and the events of a request have one order.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from typing import Any

from dinov3_ray.errors import (
    DeviceLostError,
    DeviceMemoryError,
    InputError,
    NumericsError,
    PoisonBatchError,
    PoolClosedError,
    PoolError,
    PoolTimeoutError,
    ReplicaError,
    SpecError,
)
from dinov3_ray.features import FeatureSpec
from dinov3_ray.images import ImageBatch
from dinov3_ray.interrupts import wait
from dinov3_ray.pool.client.balancer import KnownReplica
from dinov3_ray.pool.client.request import Handle, Request, RequestCutter, ResultSizes
from dinov3_ray.pool.client.routing_table import Failure, Limits, RoutingStatistics, RoutingTable, Send, Verdict
from dinov3_ray.pool.messages import Answer, Array, Outcome, PoolView, ReplicaView
from dinov3_ray.pool.metrics import ClientSeconds, Sample
from dinov3_ray.pool.transport.protocol import Gone, Transport, Unreachable

__all__ = ["Router", "failure_of", "read_client", "why_empty"]


log = logging.getLogger("dinov3_ray")

_LOOK_SECONDS = 0.5  # between looks whether the connection is there still, while somebody waits
_CONTROLLER_RETRY = 0.5  # seconds between tries to reach a controller that is away
_REPLICA_RETRY = 1.0  # seconds until a replica whose connection broke is tried again
# No other replica would say anything else: they have the same memory, and one that lost its device and lives on shares
# its process with the others.
_FINAL = (InputError, SpecError, DeviceMemoryError, DeviceLostError)


class Router:
    """One client's requests to one pool.

    Args:
        transport: what carries them.
        pool: the pool's name, for messages.
        limits: what may be in flight; ``max_bytes=0`` takes the transport's default.
        timeout: seconds that requests wait for a pool without any replica.
        address: under which another process finds the pool; None if it lives in this process alone.
    """

    def __init__(
        self, transport: Transport, pool: str, limits: Limits, timeout: float, *, address: str | None = None
    ) -> None:
        self.address = address
        self.client_id = uuid.uuid4().hex[:12]
        self.pool = pool
        self.timeout = timeout
        self.seconds = ClientSeconds()
        self.max_bytes = limits.max_bytes or transport.default_max_bytes
        self._transport = transport
        self._table = RoutingTable(replace(limits, max_bytes=self.max_bytes))
        self._sizes = ResultSizes()
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._requests: dict[str, Request] = {}
        self._replicas: dict[str, ReplicaView] = {}
        self._view: PoolView | None = None
        self._viewed = threading.Event()
        self._follow_at: float | None = None
        self._empty_since = time.monotonic()
        self._lock = threading.Lock()
        self._cutter = RequestCutter(transport, self.client_id, self.max_bytes)
        self._batches = 0
        self._closed = False
        self._ended: PoolError | None = None
        self._thread = threading.Thread(target=self._run, name=f"dinov3-router-{pool}", daemon=True)
        self._thread.start()
        self._events.put(self._follow)

    # What callers use -----------------------------------------------------------------------------------------------

    def view(self, timeout: float) -> PoolView:
        """The pool as it was last heard of.

        Raises:
            PoolTimeoutError: the controller did not answer within ``timeout`` seconds.
        """
        answered = wait(self._viewed.wait, timeout)
        self._require_open()
        if not answered or self._view is None:
            raise PoolTimeoutError(f"the controller of pool {self.pool!r} did not answer within {timeout:g} s")
        return self._view

    def refresh(self, timeout: float) -> PoolView:
        """The pool as its controller knows it now, or as it was last heard of if that takes over ``timeout`` seconds.

        Raises:
            PoolTimeoutError: as :meth:`view`.
        """
        heard = threading.Event()

        def take(view: PoolView | Gone | Unreachable) -> None:
            if isinstance(view, PoolView) and not view.closed and (self._view is None or view.epoch > self._view.epoch):
                self._learn(view)
            heard.set()

        def ask() -> None:
            quietly(self._transport.follow, self.client_id, -1, lambda view: self._events.put(lambda: take(view)))

        self._events.put(ask)
        wait(heard.wait, timeout)
        return self.view(timeout)

    def submit(self, images: ImageBatch, spec: FeatureSpec, max_batch: int) -> Handle:
        """Send a batch in parts of at most ``max_batch`` images; returns at once.

        The images are copied before it returns: the caller may change them.
        """
        self._require_open()
        with self._lock:
            handle = Handle(self._batches, len(images), self._cancel)
            self._batches += 1
        requests = self._cutter.cut(handle, images, spec, max_batch)
        with self._lock:
            # Under the lock, so that close() comes before or after it: an event behind its end would be lost.
            if not self._closed:
                self._events.put(lambda: self._accept(requests))
                return handle
        self._cutter.release(requests)
        handle.finish(self._was_closed())
        return handle

    def statistics(self) -> RoutingStatistics:
        return self._table.statistics()

    def close(self) -> None:
        """Give up what is in flight and end the thread. Harmless when repeated."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._events.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)

    def __repr__(self) -> str:
        return f"<Router to {self.pool!r}: {self._table!r}>"

    # The thread -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            log.exception("pool %s: the router failed", self.pool)
            with self._lock:
                self._closed = True
            for request in list(self._requests.values()):
                request.handle.finish(PoolError(f"the router of pool {self.pool!r} failed: {error!r}"))

    def _loop(self) -> None:
        while True:
            try:
                event = self._events.get(timeout=self._pause())
                while True:
                    if event is None:
                        self._shut()
                        return
                    event()
                    event = self._events.get_nowait()
            except queue.Empty:
                pass  # no event, or no more of them: look at the clock, then send what can be sent
            self._look_at_the_clock()
            for send in self._table.next_sends(time.monotonic()):
                self._send(send)

    def _pause(self) -> float | None:
        """Seconds until something is due; None if only an event can change anything."""
        due = [self._table.next_deadline(), self._follow_at]
        if self._requests or not self._viewed.is_set():
            due.append(time.monotonic() + _LOOK_SECONDS)
        if not self._replicas and self._requests:
            due.append(self._empty_since + self.timeout)
        nearest = min((moment for moment in due if moment is not None), default=None)
        return None if nearest is None else max(0.0, nearest - time.monotonic())

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        lost = None if self._ended else self._transport.loss()
        if lost is not None:
            self._end(lost)
        for request_id, attempt, replica_id in self._table.expired(now):
            log.warning("pool %s: replica %s has not answered request %s in time", self.pool, replica_id, request_id)
            self._failed(request_id, attempt, Failure.TIMEOUT, pause=self.timeout)
        if self._follow_at is not None and self._follow_at <= now:
            self._follow()
        if not self._replicas and self._requests and now >= self._empty_since + self.timeout:
            reason = why_empty(self.pool, self.timeout, self._view)
            for request in list(self._requests.values()):
                self._give_up(request, PoolTimeoutError(reason))

    def _shut(self) -> None:
        for request in list(self._requests.values()):
            self._give_up(request, PoolClosedError(f"the client of pool {self.pool!r} was closed with this in flight"))
        quietly(self._transport.publish, read_client(self._table.statistics(), self.seconds))
        quietly(self._transport.leave, self.client_id)

    # Views ----------------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        self._follow_at = None
        quietly(self._transport.publish, read_client(self._table.statistics(), self.seconds))
        epoch = self._view.epoch if self._view else -1
        try:
            self._transport.follow(self.client_id, epoch, lambda view: self._events.put(lambda: self._on_view(view)))
        except Exception as error:  # noqa: BLE001 - such as a Ray that this process has left
            self._on_view(Unreachable(str(error)))

    def _on_view(self, view: PoolView | Gone | Unreachable) -> None:
        if isinstance(view, Unreachable):
            # Requests go on meanwhile over the replicas that are known.
            log.debug("the controller of pool %s is away: %s", self.pool, view)
            self._follow_at = time.monotonic() + _CONTROLLER_RETRY
            return
        if isinstance(view, Gone) or view.closed:
            why = "" if isinstance(view, Gone) or not view.why_closed else f": {view.why_closed}"
            self._end(PoolClosedError(f"pool {self.pool!r} was shut down{why}"))
            return
        self._learn(view)
        self._follow()

    def _learn(self, view: PoolView) -> None:
        self._view = view
        self._viewed.set()
        self._sizes.learn_teacher(view.info)
        self._table.window = view.options.window
        self._replicas.update({replica.replica_id: replica for replica in view.replicas})
        self._table.set_replicas(
            KnownReplica(replica.replica_id, replica.node_id == self._transport.node_id, replica.fingerprint)
            for replica in view.replicas
        )
        self._forget_lost()

    def _end(self, error: PoolError) -> None:
        """The pool is out of reach for good: fail what is in flight, and what is still to come."""
        self._ended = error
        self._viewed.set()
        self._replicas = {}
        self._table.set_replicas([])
        for request in list(self._requests.values()):
            self._give_up(request, copy(error))

    def _require_open(self) -> None:
        if self._closed:
            raise self._was_closed()
        error = self._ended or self._transport.loss()
        if error is not None:
            raise copy(error)

    def _was_closed(self) -> PoolClosedError:
        return PoolClosedError(f"this client of pool {self.pool!r} is closed")

    def _forget_lost(self) -> None:
        """Drop handles of replicas that the table no longer has."""
        self._replicas = {name: replica for name, replica in self._replicas.items() if self._table.knows(name)}
        if self._replicas:
            self._empty_since = float("inf")
        elif self._empty_since == float("inf"):
            self._empty_since = time.monotonic()

    # Requests -------------------------------------------------------------------------------------------------------

    def _accept(self, requests: list[Request]) -> None:
        if not self._replicas and not self._requests:
            self._empty_since = time.monotonic()  # patience with an empty pool begins with the first who waits
        for request in requests:
            self._requests[request.request_id] = request
            self._enter(request)
        if self._ended is not None:
            self._give_up(requests[0], copy(self._ended))

    def _enter(self, request: Request, fingerprint: str | None = None) -> None:
        nbytes = request.nbytes + self._sizes.expect(request)
        self._table.submit(request.request_id, rows=request.header.rows, nbytes=nbytes, fingerprint=fingerprint)

    def _send(self, send: Send) -> None:
        request = self._requests[send.request_id]
        backlog = self._table.statistics().waiting * request.header.rows
        header = replace(request.header, suspect=send.suspect, urgent=send.urgent, backlog=backlog)
        request.sent_at = time.monotonic()

        def on_answer(answer: tuple[Answer, list[Array]] | Exception) -> None:
            self._events.put(lambda: self._on_answer(send, answer))

        try:
            request.cancel_send = self._transport.send(
                self._replicas[send.replica_id], header, request.staged, on_answer
            )
        except Exception as error:  # noqa: BLE001 - such as a full store: booked like any other failed send
            on_answer(error)

    def _on_answer(self, send: Send, answer: tuple[Answer, list[Array]] | Exception) -> None:
        request = self._requests.get(send.request_id)
        if isinstance(answer, Gone):
            computing = send.suspect and bool(quietly(self._transport.was_computing, send.replica_id, send.request_id))
            self._failed(send.request_id, send.attempt, Failure.DIED, computing=computing)
        elif isinstance(answer, Unreachable):
            self._failed(send.request_id, send.attempt, Failure.TIMEOUT, pause=_REPLICA_RETRY)
        elif isinstance(answer, Exception):
            if request is not None:
                request.error = answer
            self._failed(send.request_id, send.attempt, Failure.ERROR)
        elif answer[0].outcome is Outcome.DONE:
            self._arrived(send, *answer)
        elif answer[0].outcome is Outcome.FAILED:
            self._raised(send, answer[0])
        elif answer[0].outcome is Outcome.DRAINING:
            self._failed(send.request_id, send.attempt, Failure.LEAVING)
        else:
            self._failed(send.request_id, send.attempt, Failure.FULL, pause=max(answer[0].retry_after, 0.01))

    def _arrived(self, send: Send, answer: Answer, arrays: list[Array]) -> None:
        request = self._requests.get(send.request_id)
        history = self._table.history(send.request_id)
        others = answer.load.rows - answer.load.own_rows
        busy = answer.seconds.busy
        first = self._table.answered(
            send.request_id, send.replica_id, time.monotonic(), seconds=busy, other_rows=others
        )
        if not first or request is None:
            return
        if isinstance(request.error, NumericsError):
            # Another replica computed the same images well: those that did not are sick.
            for replica_id in history:
                quietly(self._transport.report_sick, replica_id, str(request.error))
        self.seconds.transfer += max(0.0, time.monotonic() - request.sent_at - answer.seconds.total)
        self._sizes.learn(request, sum(array.nbytes for array in arrays))
        request.answer, request.arrays = answer, self._transport.adopt(arrays)
        handle = request.handle
        if any(other.answer is None for other in handle.requests):
            return
        newest, stale = self._newest(handle), self._of_another_teacher(handle)
        for other in stale:
            other.answer, other.arrays = None, ()
            self._enter(other, fingerprint=newest)
        if not stale:
            for other in handle.requests:
                self._release(other.request_id)
            handle.finish()

    def _of_another_teacher(self, handle: Handle) -> list[Request]:
        """Requests to compute again, since a reload fell between them and the others: no batch mixes teachers."""
        newest = self._newest(handle)
        return [request for request in handle.requests if request.fingerprint not in (newest, None)]

    def _newest(self, handle: Handle) -> str | None:
        made_by = {request.fingerprint for request in handle.requests if request.answer is not None}
        current = self._view.info.fingerprint if self._view and self._view.info else None
        return current if current in made_by else next(iter(made_by), None)

    def _raised(self, send: Send, answer: Answer) -> None:
        request = self._requests.get(send.request_id)
        if request is None:
            return
        error = answer.error
        assert error is not None
        error.add_note(f"raised by replica {send.replica_id} of pool {self.pool!r}:\n{answer.trace}")
        request.error = error
        if isinstance(error, _FINAL):
            self._table.cancel(send.request_id)
            self._give_up(request, error)
        else:
            self._failed(send.request_id, send.attempt, Failure.ERROR)

    def _failed(
        self, request_id: str, attempt: int, failure: Failure, *, pause: float = 0.0, computing: bool = False
    ) -> None:
        verdict = self._table.failed(request_id, attempt, failure, time.monotonic(), pause=pause, computing=computing)
        self._forget_lost()
        request = self._requests.get(request_id)
        if request is None or verdict in (Verdict.RESEND, Verdict.STALE):
            return
        if verdict is not Verdict.RAISE:
            self._give_up(request, failure_of(request, self.pool, verdict))
            return
        assert request.error is not None
        request.error.add_note(f"{request.describe(self.pool)}: every replica that was tried raised")
        self._give_up(request, request.error)

    def _give_up(self, request: Request, error: BaseException) -> None:
        """Fail the batch that ``request`` belongs to, with all its requests."""
        handle = request.handle
        for other in handle.requests:
            if self._table.cancel(other.request_id) and other.cancel_send is not None:
                quietly(other.cancel_send)
            self._release(other.request_id)
        handle.finish(error)

    def _release(self, request_id: str) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._cutter.release([request])

    def _cancel(self, handle: Handle) -> None:
        def cancel() -> None:
            held = next((request for request in handle.requests if request.request_id in self._requests), None)
            if held is not None:
                self._give_up(held, PoolClosedError(f"batch {handle.index} was cancelled"))

        self._events.put(cancel)


def quietly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call something whose failure must not stop the router; the failure is logged."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001 - see above
        log.debug("%r failed: %s", function, error)
        return None


def why_empty(pool: str, timeout: float, view: PoolView | None) -> str:
    """Why nothing could be sent for ``timeout`` seconds."""
    if view is None:
        return f"the controller of pool {pool!r} did not answer within timeout={timeout:g} s"
    errors = f"; last errors: {'; '.join(view.recent_errors[-3:])}" if view.recent_errors else ""
    return (
        f"pool {pool!r} had no replica ready for timeout={timeout:g} s (0 of {view.target} wanted){errors}. "
        f"See `dinov3-ray status --name {pool}`"
    )


def failure_of(request: Request, pool: str, verdict: Verdict) -> PoolError:
    """The error for a request that ended its replicas, or met too many that ended."""
    where = request.describe(pool)
    if verdict is Verdict.POISON:
        return PoisonBatchError(f"{where}: replica after replica died while computing it")
    return ReplicaError(f"{where}: given up, too many replicas died or fell silent with it")


def read_client(routing: RoutingStatistics, seconds: ClientSeconds) -> Iterator[Sample]:
    yield Sample("dinov3_answers", routing.answered)
    yield Sample("dinov3_retries", routing.resends)
    yield Sample("dinov3_stage_seconds", seconds.transfer, "transfer")
    yield Sample("dinov3_in_flight", routing.in_flight)
    yield Sample("dinov3_in_flight_bytes", routing.in_flight_bytes)
    yield Sample("dinov3_waiting", routing.waiting)
    yield Sample("dinov3_trainer_seconds", seconds.trainer)
    yield Sample("dinov3_trainer_wait_seconds", seconds.trainer_wait)
