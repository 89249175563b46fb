"""Where each request goes, what is in flight, and what to do when an answer does not come. Pure: no Ray, no clock.

One client's book. Every request is in exactly one place: waiting, in flight at one replica, or done with. The
decision is the better of two random replicas with a free place ("power of two choices"): the one that will be
through with its rows
first, counting this client's own book, the load that replicas report with their answers, and each replica's measured
speed. Mitzenmacher (2001) shows that the second look takes the longest queue from log n to log log n, where always
taking
the least reported one would send every client to the same replica between two reports.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Failure", "Limits", "RoutingBook", "RoutingStatistics", "Send", "Verdict"]

_SMOOTHING = 0.2  # weight of the newest answer in a replica's measured speed
_REPORT_LIFE = 2.0  # seconds after which a reported load says nothing any more


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may have in flight, and how often a request is sent."""

    max_requests: int = 1024
    max_bytes: int = 2**30
    attempt_timeout: float = 120.0
    #: Sends of one request whose replica died or fell silent, before it is given up.
    max_attempts: int = 10
    #: Replicas whose teacher raised on one request, before its error is the caller's.
    max_errors: int = 3
    #: Replicas that died while computing one request alone, before it is called poison.
    max_deaths: int = 2


class Failure(StrEnum):
    """Why a send came to nothing."""

    DIED = "died"
    ERROR = "error"
    TIMEOUT = "timeout"
    FULL = "full"
    GONE = "gone"  # the replica left the pool, or is about to


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
    """Send ``request_id`` to ``replica_id`` now."""

    request_id: str
    attempt: int
    replica_id: str
    suspect: bool
    urgent: bool


@dataclass(frozen=True, slots=True)
class RoutingStatistics:
    """A snapshot of the book."""

    replicas: int
    waiting: int
    in_flight: int
    in_flight_bytes: int
    answered: int
    resends: int
    peak_in_flight: int
    peak_bytes: int


@dataclass(slots=True)
class _Request:
    request_id: str
    rows: int
    nbytes: int
    fingerprint: str | None
    attempt: int = 0
    replica_id: str | None = None
    errors: int = 0
    deaths: int = 0
    losses: int = 0
    tried: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Replica:
    replica_id: str
    local: bool
    fingerprint: str | None
    in_flight: dict[str, int] = field(default_factory=dict)  # request -> rows
    rows: int = 0
    other_rows: int = 0
    reported: float = 0.0
    seconds_per_row: float | None = None
    paused_until: float = 0.0


class RoutingBook:
    """One client's requests and replicas.

    The caller drives it: tell it of replicas, submissions, answers and failures, then carry out what :meth:`next_sends`
    returns. Times are seconds of one monotonic clock that the caller passes in.
    """

    def __init__(self, limits: Limits, *, window: int = 2, seed: int | None = None) -> None:
        #: Requests that this client keeps at one replica.
        self.window = window
        self._limits = limits
        self._random = random.Random(seed)  # noqa: S311 - a load balancer's choice, not a secret
        self._requests: dict[str, _Request] = {}
        self._waiting: deque[str] = deque()
        self._urgent: deque[str] = deque()
        self._replicas: dict[str, _Replica] = {}
        # Replicas with a free place, in a list with positions: choosing and removing cost O(1) at any pool size.
        self._open: list[str] = []
        self._open_at: dict[str, int] = {}
        self._paused: set[str] = set()
        self._dead: set[str] = set()
        # Every send has the same patience, so deadlines stand in the order of sending.
        self._deadlines: deque[tuple[float, str, int]] = deque()
        self._in_flight = self._in_flight_bytes = self._answered = self._resends = 0
        self._peak_in_flight = self._peak_bytes = 0
        self._mean_speed: float | None = None

    # Replicas -------------------------------------------------------------------------------------------------------

    def set_replicas(self, replicas: Iterable[tuple[str, bool, str | None]]) -> list[str]:
        """Replace the list of replicas by ``(replica_id, on this node, fingerprint)``.

        Returns:
            Requests in flight at replicas that are gone from the list. They stay in flight, since a replica being
            drained still answers; the caller fails them if it does not want to wait.
        """
        wanted = {replica_id: (local, fingerprint) for replica_id, local, fingerprint in replicas}
        # The pool may hear of a death later than this client does; names are never used again.
        self._dead &= wanted.keys()
        for replica_id in self._dead:
            del wanted[replica_id]
        orphans: list[str] = []
        for replica_id in [known for known in self._replicas if known not in wanted]:
            orphans += self._drop_replica(replica_id)
        for replica_id, (local, fingerprint) in wanted.items():
            if replica_id not in self._replicas:
                self._replicas[replica_id] = _Replica(replica_id, local, fingerprint)
            self._replicas[replica_id].fingerprint = fingerprint
            self._refresh(replica_id)
        return orphans

    def _drop_replica(self, replica_id: str) -> list[str]:
        self._close(replica_id)
        self._paused.discard(replica_id)
        return list(self._replicas.pop(replica_id).in_flight)

    # Requests -------------------------------------------------------------------------------------------------------

    def submit(self, request_id: str, *, rows: int, nbytes: int, fingerprint: str | None = None) -> None:
        """Take a request: ``nbytes`` is what its images and its expected result occupy while it is in flight.

        With ``fingerprint``, only a replica whose teacher has it will do.
        """
        assert request_id not in self._requests, request_id
        self._requests[request_id] = _Request(request_id, rows, nbytes, fingerprint)
        self._waiting.append(request_id)

    def next_sends(self, now: float) -> list[Send]:
        """Take from the queue, in order, all that limits and replicas allow now."""
        self._resume(now)
        sends: list[Send] = []
        for queue in (self._urgent, self._waiting):
            while queue:
                request = self._requests[queue[0]]
                if not self._has_room(request.nbytes):
                    return sends
                replica = self._choose(request, now)
                if replica is None:
                    break
                queue.popleft()
                sends.append(self._send(request, replica, now))
        return sends

    def answered(self, request_id: str, replica_id: str, now: float, *, seconds: float, other_rows: int) -> bool:
        """Book an answer; ``seconds`` is what it kept the replica busy, ``other_rows`` what waits there for others.

        Returns:
            Whether it is the request's first answer. A late answer to an earlier send counts too: the result is the
            same, and the later send is forgotten.
        """
        request = self._requests.get(request_id)
        replica = self._replicas.get(replica_id)
        if replica is not None and replica_id in self._paused:
            replica.paused_until = now  # it answers, so it may work again
            self._resume(now)
        if request is None:
            return False
        if replica is not None:
            self._learn(replica, request.rows, seconds, other_rows, now)
        self._withdraw(request)
        del self._requests[request_id]
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
        """Book that a send came to nothing.

        Args:
            pause: seconds for which the replica gets no more work (it is full, or does not answer).
            computing: the replica died in the middle of this very request, which ran there alone.
        """
        request = self._requests.get(request_id)
        if request is None or request.attempt != attempt or request.replica_id is None:
            return Verdict.STALE
        replica_id = request.replica_id
        self._withdraw(request)
        if failure in (Failure.DIED, Failure.GONE) and replica_id in self._replicas:
            # Others in flight there will each fail by themselves; no more are sent.
            self._drop_replica(replica_id)
            self._dead.add(replica_id)
        elif pause and replica_id in self._replicas:
            self._replicas[replica_id].paused_until = now + pause
            self._close(replica_id)
            self._paused.add(replica_id)
        verdict = self._judge(request, failure, computing)
        if verdict is Verdict.RESEND:
            if failure is not Failure.FULL:
                request.tried.add(replica_id)
                self._resends += 1
            self._urgent.append(request_id)
        else:
            del self._requests[request_id]
        return verdict

    def _judge(self, request: _Request, failure: Failure, computing: bool) -> Verdict:
        if failure is Failure.ERROR:
            request.errors += 1
            return Verdict.RAISE if request.errors >= self._limits.max_errors else Verdict.RESEND
        if failure in (Failure.DIED, Failure.TIMEOUT):
            request.losses += 1
            request.deaths += computing
            if request.deaths >= self._limits.max_deaths:
                return Verdict.POISON
            if request.losses >= self._limits.max_attempts:
                return Verdict.EXHAUSTED
        return Verdict.RESEND

    def cancel(self, request_id: str) -> bool:
        """Forget a request, wherever it is; False if it is not known (any more)."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        self._withdraw(request)
        for queue in (self._urgent, self._waiting):
            if request_id in queue:
                queue.remove(request_id)
        return True

    # Time -----------------------------------------------------------------------------------------------------------

    def expired(self, now: float) -> list[tuple[str, int, str]]:
        """(request, attempt, replica) of each send whose deadline has passed; the caller reports them as failed."""
        overdue = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id, attempt = self._deadlines.popleft()
            if self._is_current(request_id, attempt):
                overdue.append((request_id, attempt, self._requests[request_id].replica_id or ""))
        return overdue

    def next_deadline(self) -> float | None:
        """When to look again if nothing happens before."""
        while self._deadlines and not self._is_current(*self._deadlines[0][1:]):
            self._deadlines.popleft()
        deadlines = [self._deadlines[0][0]] if self._deadlines else []
        if self._urgent or self._waiting:
            deadlines += [self._replicas[replica_id].paused_until for replica_id in self._paused]
        return min(deadlines, default=None)

    def _is_current(self, request_id: str, attempt: int) -> bool:
        request = self._requests.get(request_id)
        return request is not None and request.attempt == attempt and request.replica_id is not None

    # Looking in -----------------------------------------------------------------------------------------------------

    def knows(self, replica_id: str) -> bool:
        """Whether a replica is among those that may get work, now or later."""
        return replica_id in self._replicas

    def replica_of(self, request_id: str) -> str | None:
        """Where a request is in flight."""
        request = self._requests.get(request_id)
        return request.replica_id if request else None

    def history(self, request_id: str) -> set[str]:
        """The replicas on which a request came to nothing."""
        request = self._requests.get(request_id)
        return set(request.tried) if request else set()

    def has_room(self, nbytes: int) -> bool:
        """Whether a request of ``nbytes`` would be within the budgets now, with all that waits before it."""
        return not self._waiting and not self._urgent and self._has_room(nbytes)

    def statistics(self) -> RoutingStatistics:
        return RoutingStatistics(
            replicas=len(self._replicas),
            waiting=len(self._waiting) + len(self._urgent),
            in_flight=self._in_flight,
            in_flight_bytes=self._in_flight_bytes,
            answered=self._answered,
            resends=self._resends,
            peak_in_flight=self._peak_in_flight,
            peak_bytes=self._peak_bytes,
        )

    def __repr__(self) -> str:
        return (
            f"<RoutingBook {len(self._replicas)} replicas ({len(self._open)} open), {self._in_flight} in flight, "
            f"{len(self._waiting) + len(self._urgent)} waiting>"
        )

    # The decision ---------------------------------------------------------------------------------------------------

    def _choose(self, request: _Request, now: float) -> _Replica | None:
        candidates = self._open
        if request.fingerprint is not None:
            candidates = [one for one in candidates if self._replicas[one].fingerprint == request.fingerprint]
        if request.tried:
            # A replica on which it failed is the last resort: it is taken only if there is no other at all.
            fresh = [one for one in candidates if one not in request.tried]
            candidates = fresh if fresh or any(one not in request.tried for one in self._replicas) else candidates
        if not candidates:
            return None
        if len(candidates) == 1:
            return self._replicas[candidates[0]]
        # Two different random positions: random.sample costs ten times as much.
        first = int(self._random.random() * len(candidates))
        second = (first + 1 + int(self._random.random() * (len(candidates) - 1))) % len(candidates)
        one, other = self._replicas[candidates[first]], self._replicas[candidates[second]]
        return one if self._cost(one, request, now) <= self._cost(other, request, now) else other

    def _cost(self, replica: _Replica, request: _Request, now: float) -> tuple[float, bool]:
        """Seconds until ``replica`` would be through with ``request``; the replica on this node wins a tie."""
        age = now - replica.reported
        others = replica.other_rows * max(0.0, 1 - age / _REPORT_LIFE)
        speed = replica.seconds_per_row or self._mean_speed or 1.0
        return (others + replica.rows + request.rows) * speed, not replica.local

    def _has_room(self, nbytes: int) -> bool:
        if self._in_flight == 0:
            return True  # one request may exceed the byte budget, or it could never run
        within_count = self._in_flight < self._limits.max_requests
        return within_count and self._in_flight_bytes + nbytes <= self._limits.max_bytes

    # The books ------------------------------------------------------------------------------------------------------

    def _send(self, request: _Request, replica: _Replica, now: float) -> Send:
        request.attempt += 1
        request.replica_id = replica.replica_id
        self._deadlines.append((now + self._limits.attempt_timeout, request.request_id, request.attempt))
        replica.in_flight[request.request_id] = request.rows
        replica.rows += request.rows
        self._in_flight += 1
        self._in_flight_bytes += request.nbytes
        self._peak_in_flight = max(self._peak_in_flight, self._in_flight)
        self._peak_bytes = max(self._peak_bytes, self._in_flight_bytes)
        self._refresh(replica.replica_id)
        urgent = request.losses + request.errors > 0
        return Send(request.request_id, request.attempt, replica.replica_id, request.losses > 0, urgent)

    def _withdraw(self, request: _Request) -> None:
        """Take a request out of flight, if it is: the one place where what is in flight shrinks."""
        replica_id, request.replica_id = request.replica_id, None
        if replica_id is None:
            # It waits to be sent again, and a late answer came first.
            if request.request_id in self._urgent:
                self._urgent.remove(request.request_id)
            return
        self._in_flight -= 1
        self._in_flight_bytes -= request.nbytes
        assert self._in_flight >= 0, "a request was taken out of flight twice"
        assert self._in_flight_bytes >= 0
        replica = self._replicas.get(replica_id)
        if replica is not None and replica.in_flight.pop(request.request_id, None) is not None:
            replica.rows -= request.rows
            self._refresh(replica_id)

    def _learn(self, replica: _Replica, rows: int, seconds: float, other_rows: int, now: float) -> None:
        sample = seconds / rows
        known = replica.seconds_per_row
        replica.seconds_per_row = sample if known is None else known + _SMOOTHING * (sample - known)
        mean = self._mean_speed
        self._mean_speed = sample if mean is None else mean + _SMOOTHING * (sample - mean)
        replica.other_rows = other_rows
        replica.reported = now

    def _resume(self, now: float) -> None:
        for replica_id in [one for one in self._paused if self._replicas[one].paused_until <= now]:
            self._paused.discard(replica_id)
            self._refresh(replica_id)

    def _refresh(self, replica_id: str) -> None:
        """Open or close a replica by whether it has a free place."""
        replica = self._replicas[replica_id]
        free = len(replica.in_flight) < self.window and replica_id not in self._paused
        if not free:
            self._close(replica_id)
        elif replica_id not in self._open_at:
            self._open_at[replica_id] = len(self._open)
            self._open.append(replica_id)

    def _close(self, replica_id: str) -> None:
        position = self._open_at.pop(replica_id, None)
        if position is None:
            return
        last = self._open.pop()
        if last != replica_id:
            self._open[position] = last
            self._open_at[last] = position
