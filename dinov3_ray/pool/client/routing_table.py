"""Decides what a client sends, sends again and gives up.

Pure: no Ray, no clock. Every request is in exactly one place: waiting, in flight at one replica, or done. Which
replica it goes to is the choice of :class:`~dinov3_ray.pool.client.balancer.Balancer`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

from dinov3_ray.pool.client.balancer import Balancer, KnownReplica

__all__ = ["Failure", "Limits", "RoutingStatistics", "RoutingTable", "Send", "Verdict"]


_MOST_RENEWALS = 5  # of a deadline, for a replica that answers others: no wait is without an end


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may have in flight, and how often a request is sent."""

    max_requests: int = 1024
    max_bytes: int = 2**30
    attempt_timeout: float = 120.0
    #: Sends of one request whose replica died or fell silent, before it is given up.
    max_attempts: int = 20
    #: Replicas whose teacher raised on one request, before its error is the caller's.
    max_errors: int = 3
    #: Replicas that died while computing one request alone, before it is called poison; more where others die too.
    max_deaths: int = 3


class Failure(StrEnum):
    """Why a send came to nothing."""

    DIED = "died"
    ERROR = "error"
    TIMEOUT = "timeout"
    FULL = "full"
    LEAVING = "leaving"  # the replica left the pool, or is about to


class Verdict(StrEnum):
    """What becomes of a request after a failed send."""

    RESEND = "resend"
    #: Its teacher errors have used up the budget.
    RAISE = "raise"
    #: It ended the replicas that computed it.
    POISON = "poison"
    #: It has been sent too often.
    EXHAUSTED = "exhausted"
    #: The answer is of a send that no longer counts.
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Send:
    """The table's decision to send a request now; it stays as it is while the request's booking changes."""

    request_id: str
    attempt: int
    replica_id: str
    suspect: bool
    urgent: bool


@dataclass(frozen=True, slots=True)
class RoutingStatistics:
    """A snapshot of the table."""

    replicas: int
    waiting: int
    in_flight: int
    in_flight_bytes: int
    answered: int
    resends: int
    peak_in_flight: int
    peak_bytes: int


@dataclass(slots=True)
class _Booking:
    """What the table knows of one request, from its arrival to its answer."""

    request_id: str
    rows: int
    nbytes: int
    fingerprint: str | None
    attempt: int = 0  # the number of its last send
    renewals: int = 0  # of its last send's deadline
    replica_id: str | None = None
    errors: int = 0
    died: int = 0  # its replica died
    deaths: int = 0  # its replica died while computing it alone
    losses: int = 0  # its replica died or did not answer
    tried: set[str] = field(default_factory=set)


class RoutingTable:
    """One client's requests and replicas.

    The caller drives it: report replicas, submissions, answers and failures, then carry out what :meth:`next_sends`
    returns. Times are seconds of one monotonic clock that the caller passes in.
    """

    def __init__(self, limits: Limits, *, window: int = 2, seed: int | None = None) -> None:
        self._limits = limits
        self._requests: dict[str, _Booking] = {}
        self._waiting: deque[str] = deque()
        self._urgent: deque[str] = deque()
        self._balancer = Balancer(window, seed)
        self._dead: set[str] = set()
        self._deaths = 0
        self._heard: dict[str, float] = {}  # when each replica answered last
        # Every send has the same patience, so deadlines stand in the order of sending.
        self._deadlines: deque[tuple[float, str, int]] = deque()
        self._in_flight = self._in_flight_bytes = self._answered = self._sends = self._resends = 0
        self._peak_in_flight = self._peak_bytes = 0

    # Replicas -------------------------------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Requests that this client keeps at one replica."""
        return self._balancer.window

    @window.setter
    def window(self, window: int) -> None:
        self._balancer.window = window

    def set_replicas(self, replicas: Iterable[KnownReplica]) -> None:
        """Replace the list of replicas.

        Requests at replicas that left the list stay in flight, since a replica that is being drained still answers.
        """
        listed = {replica.replica_id: replica for replica in replicas}
        # The pool may hear of a death later than this client does; names are never used again.
        self._dead &= listed.keys()
        for replica_id in self._dead:
            del listed[replica_id]
        self._balancer.replace(listed)
        self._heard = {replica_id: heard for replica_id, heard in self._heard.items() if replica_id in listed}

    # Requests -------------------------------------------------------------------------------------------------------

    def submit(self, request_id: str, *, rows: int, nbytes: int, fingerprint: str | None = None) -> None:
        """Take a request: ``nbytes`` is what its images and its expected result occupy while it is in flight.

        With ``fingerprint``, only a replica whose teacher has it will do, as long as the pool has one.
        """
        assert request_id not in self._requests, request_id
        self._requests[request_id] = _Booking(request_id, rows, nbytes, fingerprint)
        self._waiting.append(request_id)

    def next_sends(self, now: float) -> list[Send]:
        """Take from the queue, in order, all that limits and replicas allow now.

        A request that must wait for one certain replica does not hold up those behind it; one that must wait for room
        in the budgets does, or small requests would keep a large one waiting for ever.
        """
        self._balancer.resume(now)
        sends: list[Send] = []
        room = True
        for queue in (self._urgent, self._waiting):
            held: list[str] = []
            while queue and room and self._balancer.open:
                request = self._requests[queue[0]]
                room = self._has_room(request.nbytes)
                if not room:
                    break
                queue.popleft()
                replica_id = self._balancer.take(request.rows, now, request.fingerprint, request.tried)
                if replica_id is None:
                    held.append(request.request_id)
                else:
                    sends.append(self._send(request, replica_id, now))
            queue.extendleft(reversed(held))
        return sends

    def answered(self, request_id: str, replica_id: str, now: float, *, seconds: float, other_rows: int) -> bool:
        """Record an answer; ``seconds`` is what it kept the replica busy, ``other_rows`` what waits there for others.

        Returns:
            Whether it is the request's first answer. A late answer to an earlier send counts too: the result is the
            same, and the later send is forgotten.
        """
        self._balancer.unpause(replica_id)  # it answers, so it may work again
        if replica_id in self._balancer:
            self._heard[replica_id] = now
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._balancer.learn(replica_id, request.rows, seconds, other_rows, now)
        self._forget(request)
        self._answered += 1
        return True

    def failed(
        self,
        request_id: str,
        attempt: int,
        failure: Failure,
        now: float,
        *,
        pause: float = 0.0,
        computing: bool = False,
    ) -> Verdict:
        """Record that a send came to nothing.

        Args:
            pause: seconds for which the replica gets no work (it is full, or does not answer).
            computing: the replica died in the middle of this very request, which ran there alone.
        """
        request = self._requests.get(request_id)
        if request is None or request.attempt != attempt or request.replica_id is None:
            return Verdict.STALE
        replica_id = request.replica_id
        self._land(request)
        if failure in (Failure.DIED, Failure.LEAVING) and replica_id in self._balancer:
            # Others in flight there will each fail by themselves; nothing else is sent there.
            self._balancer.remove(replica_id)
            self._dead.add(replica_id)
            self._deaths += failure is Failure.DIED
        elif pause:
            self._balancer.pause(replica_id, now + pause)
        verdict = self._judge(request, failure, computing)
        if verdict is Verdict.RESEND:
            if failure is not Failure.FULL:
                request.tried.add(replica_id)
                self._resends += 1
            self._urgent.append(request_id)
        else:
            del self._requests[request_id]
        return verdict

    def _judge(self, request: _Booking, failure: Failure, computing: bool) -> Verdict:
        if failure is Failure.ERROR:
            request.errors += 1
            return Verdict.RAISE if request.errors >= self._limits.max_errors else Verdict.RESEND
        if failure in (Failure.DIED, Failure.TIMEOUT):
            request.losses += 1
            request.died += failure is Failure.DIED
            request.deaths += computing
            if self._is_poison(request):
                return Verdict.POISON
            if request.losses >= self._limits.max_attempts:
                return Verdict.EXHAUSTED
        return Verdict.RESEND

    def _is_poison(self, request: _Booking) -> bool:
        """Whether replicas die *of* a request, and not just *with* it.

        Where nothing else dies, a few deaths in the middle of computing it are proof. Where replicas die anyway (a
        cluster of preemptible nodes), an innocent request meets such a death by chance now and then, so each unrelated
        death raises the number, up to three times as many.
        """
        unrelated = max(self._deaths - request.died, 0)
        return request.deaths >= min(self._limits.max_deaths + unrelated, 3 * self._limits.max_deaths)

    def cancel(self, request_id: str) -> bool:
        """Forget a request, wherever it is; False if it is not known (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._forget(request)
        return True

    # Time -----------------------------------------------------------------------------------------------------------

    def expired(self, now: float) -> list[tuple[str, int, str]]:
        """(request, attempt, replica) of each send whose deadline has passed; the caller reports them as failed."""
        overdue = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id, attempt = self._deadlines.popleft()
            if not self._is_current(request_id, attempt):
                continue
            request = self._requests[request_id]
            replica_id = request.replica_id or ""
            busy = self._heard.get(replica_id, -inf) > deadline - self._limits.attempt_timeout
            if busy and request.renewals < _MOST_RENEWALS:
                # It answers, so it is busy and not silent: this request may just be waiting its turn there.
                request.renewals += 1
                self._deadlines.append((now + self._limits.attempt_timeout, request_id, attempt))
            else:
                overdue.append((request_id, attempt, replica_id))
        return overdue

    def next_deadline(self) -> float | None:
        """When to look again if nothing happens before."""
        while self._deadlines and not self._is_current(*self._deadlines[0][1:]):
            self._deadlines.popleft()
        deadline = self._deadlines[0][0] if self._deadlines else inf
        if self._urgent or self._waiting:
            deadline = min(deadline, self._balancer.resume_at)
        return None if deadline == inf else deadline

    def _is_current(self, request_id: str, attempt: int) -> bool:
        request = self._requests.get(request_id)
        return request is not None and request.attempt == attempt and request.replica_id is not None

    # Looking in -----------------------------------------------------------------------------------------------------

    def knows(self, replica_id: str) -> bool:
        """Whether a replica is among those that may get work, now or later."""
        return replica_id in self._balancer

    def history(self, request_id: str) -> set[str]:
        """The replicas on which a request came to nothing."""
        request = self._requests.get(request_id)
        return set(request.tried) if request else set()

    def statistics(self) -> RoutingStatistics:
        return RoutingStatistics(
            replicas=len(self._balancer),
            waiting=len(self._waiting) + len(self._urgent),
            in_flight=self._in_flight,
            in_flight_bytes=self._in_flight_bytes,
            answered=self._answered,
            resends=self._resends,
            peak_in_flight=self._peak_in_flight,
            peak_bytes=self._peak_bytes,
        )

    def __repr__(self) -> str:
        now = self.statistics()
        return (
            f"<RoutingTable {now.replicas} replicas ({self._balancer.open} open), {now.in_flight} in flight, "
            f"{now.waiting} waiting>"
        )

    # The tables ------------------------------------------------------------------------------------------------------

    def _has_room(self, nbytes: int) -> bool:
        if self._in_flight == 0:
            return True  # one request may exceed the byte budget, or it could never run
        within_count = self._in_flight < self._limits.max_requests
        return within_count and self._in_flight_bytes + nbytes <= self._limits.max_bytes

    def _send(self, request: _Booking, replica_id: str, now: float) -> Send:
        # Numbered through all requests: one may be submitted again under its name, and its old sends must not count.
        self._sends += 1
        request.attempt = self._sends
        request.replica_id = replica_id
        request.renewals = 0
        self._deadlines.append((now + self._limits.attempt_timeout, request.request_id, request.attempt))
        self._in_flight += 1
        self._in_flight_bytes += request.nbytes
        self._peak_in_flight = max(self._peak_in_flight, self._in_flight)
        self._peak_bytes = max(self._peak_bytes, self._in_flight_bytes)
        urgent = request.losses + request.errors > 0
        return Send(request.request_id, request.attempt, replica_id, request.losses > 0, urgent)

    def _land(self, request: _Booking) -> None:
        """Take a request out of flight: the one place where what is in flight shrinks."""
        replica_id, request.replica_id = request.replica_id, None
        assert replica_id is not None, "a request was taken out of flight twice"
        self._balancer.give_back(replica_id, request.rows)
        self._in_flight -= 1
        self._in_flight_bytes -= request.nbytes
        assert self._in_flight >= 0
        assert self._in_flight_bytes >= 0

    def _forget(self, request: _Booking) -> None:
        """Take a request out of the table, wherever it is."""
        del self._requests[request.request_id]
        if request.replica_id is not None:
            self._land(request)
            return
        # It waits: to be sent again, when the late answer to an earlier send comes first, or as its caller gives it up.
        queue = self._urgent if request.request_id in self._urgent else self._waiting
        queue.remove(request.request_id)
