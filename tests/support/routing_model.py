"""An independent model of a routing table, and the machine that drives both with any interleaving of what can happen.

The model says which request must be sent next, and to which replicas it may go; only the choice among those is the
table's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dinov3_ray.pool.client.balancer import KnownReplica
from dinov3_ray.pool.client.routing_table import Failure, Limits, RoutingTable, Send, Verdict

LIMITS = Limits(max_requests=5, max_bytes=100, attempt_timeout=10.0, max_attempts=3, max_errors=2, max_deaths=2)
LOSSES = (Failure.DIED, Failure.TIMEOUT)


@dataclass
class Wanted:
    """What the model knows of one request."""

    rows: int
    nbytes: int
    fingerprint: str | None
    at: str | None = None
    attempt: int = 0
    deadline: float = inf
    renewals: int = 0
    errors: int = 0
    losses: int = 0
    died: int = 0
    deaths: int = 0
    tried: set[str] = field(default_factory=set)


class RoutingMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = RoutingTable(LIMITS, window=2, seed=0)
        self.window = 2
        self.now = 0.0
        self.requests: dict[str, Wanted] = {}
        self.first: list[str] = []  # to be sent again, before
        self.then: list[str] = []  # those never sent
        self.replicas: dict[str, str | None] = {}
        self.ever: list[str] = []
        self.dead: set[str] = set()
        self.deaths = 0
        self.heard: dict[str, float] = {}
        self.paused: dict[str, float] = {}
        self.sends: list[Send] = []  # all of them, ever
        self.names = 0
        self.answered = self.resends = self.peak = self.peak_bytes = 0

    # What the model makes of the state ------------------------------------------------------------------------------

    def flying(self) -> list[Wanted]:
        return [one for one in self.requests.values() if one.at is not None]

    def open(self) -> set[str]:
        load = [one.at for one in self.flying()]
        return {name for name in self.replicas if load.count(name) < self.window and name not in self.paused}

    def room(self, nbytes: int) -> bool:
        flying = self.flying()
        within = len(flying) < LIMITS.max_requests and sum(one.nbytes for one in flying) + nbytes <= LIMITS.max_bytes
        return not flying or within

    def may_go_to(self, request: Wanted) -> set[str]:
        suitable = {name for name, has in self.replicas.items() if has == request.fingerprint}
        if request.fingerprint is None or not suitable:
            suitable = set(self.replicas)
        return ((suitable - request.tried) or suitable) & self.open()

    def forget(self, request_id: str) -> None:
        del self.requests[request_id]
        for queue in (self.first, self.then):
            if request_id in queue:
                queue.remove(request_id)

    def current(self, send: Send) -> bool:
        request = self.requests.get(send.request_id)
        return request is not None and request.at is not None and request.attempt == send.attempt

    # What may happen ------------------------------------------------------------------------------------------------

    @rule(
        rows=st.integers(1, 8),
        nbytes=st.sampled_from([0, 10, 30, 60, 150]),
        fingerprint=st.sampled_from([None, None, None, "old", "new"]),
        again=st.booleans(),
        data=st.data(),
    )
    def submit(self, rows: int, nbytes: int, fingerprint: str | None, again: bool, data: st.DataObject) -> None:
        """A new request, or one that was answered and is to be computed again under its name."""
        done = sorted({send.request_id for send in self.sends} - self.requests.keys())
        request_id = data.draw(st.sampled_from(done)) if again and done else f"q{self.names}"
        self.names += 1
        self.table.submit(request_id, rows=rows, nbytes=nbytes, fingerprint=fingerprint)
        self.requests[request_id] = Wanted(rows, nbytes, fingerprint)
        self.then.append(request_id)

    @rule(
        new=st.lists(st.sampled_from([None, "old", "new"]), max_size=3),
        data=st.data(),
        window=st.sampled_from([None, None, 1, 2, 3]),
    )
    def view(self, new: list[str | None], data: st.DataObject, window: int | None) -> None:
        """Replicas join, leave, and come back to the list; the list may still name some that this client saw die."""
        kept = data.draw(st.sets(st.sampled_from(self.ever))) if self.ever else set()
        known = {name: self.replicas.get(name, "old") for name in sorted(kept)}
        for fingerprint in new:
            name = f"r{len(self.ever)}"
            self.ever.append(name)
            known[name] = fingerprint
        if window is not None:
            self.table.window = self.window = window
        self.dead &= known.keys()
        self.replicas = {name: has for name, has in known.items() if name not in self.dead}
        self.heard = {name: when for name, when in self.heard.items() if name in self.replicas}
        self.paused = {name: until for name, until in self.paused.items() if name in self.replicas}
        self.table.set_replicas(KnownReplica(name, name == "r0", has) for name, has in known.items())

    @rule(seconds=st.sampled_from([0.5, 3.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def send(self) -> None:
        self.paused = {name: until for name, until in self.paused.items() if until > self.now}
        sends = iter(self.table.next_sends(self.now))
        for queue in (self.first, self.then):
            for request_id in list(queue):
                request = self.requests[request_id]
                if not self.open():
                    break
                if not self.room(request.nbytes):
                    assert next(sends, None) is None
                    return
                suitable = self.may_go_to(request)
                if suitable:
                    send = next(sends)
                    assert send.request_id == request_id
                    assert send.replica_id in suitable
                    assert send.attempt not in {before.attempt for before in self.sends}
                    assert send.suspect == (request.losses > 0)
                    assert send.urgent == (request.losses + request.errors > 0)
                    queue.remove(request_id)
                    request.at, request.attempt = send.replica_id, send.attempt
                    request.renewals = 0
                    request.deadline = self.now + LIMITS.attempt_timeout
                    self.sends.append(send)
                    self.peak = max(self.peak, len(self.flying()))
                    self.peak_bytes = max(self.peak_bytes, sum(one.nbytes for one in self.flying()))
        assert next(sends, None) is None

    @precondition(lambda self: self.sends)
    @rule(data=st.data(), seconds=st.floats(0.01, 10), others=st.integers(0, 100))
    def answer(self, data: st.DataObject, seconds: float, others: int) -> None:
        """Of any send that was ever made: the current one, an earlier one, or of a request that is done with."""
        send = data.draw(st.sampled_from(self.sends))
        first = self.table.answered(send.request_id, send.replica_id, self.now, seconds=seconds, other_rows=others)
        self.paused.pop(send.replica_id, None)
        if send.replica_id in self.replicas:
            self.heard[send.replica_id] = self.now
        assert first == (send.request_id in self.requests)
        if first:
            self.answered += 1
            self.forget(send.request_id)

    @precondition(lambda self: self.sends)
    @rule(
        data=st.data(),
        failure=st.sampled_from(Failure),
        pause=st.sampled_from([0.0, 1.0, 20.0]),
        computing=st.booleans(),
    )
    def fail(self, data: st.DataObject, failure: Failure, pause: float, computing: bool) -> None:
        """Of any send that was ever made."""
        send = data.draw(st.sampled_from(self.sends[-8:]))
        verdict = self.table.failed(send.request_id, send.attempt, failure, self.now, pause=pause, computing=computing)
        if not self.current(send):
            assert verdict is Verdict.STALE
            return
        self.book_failure(send, failure, pause, computing, verdict)

    def book_failure(self, send: Send, failure: Failure, pause: float, computing: bool, verdict: Verdict) -> None:
        request = self.requests[send.request_id]
        request.at = None
        if failure in (Failure.DIED, Failure.LEAVING):
            if self.replicas.pop(send.replica_id, "absent") != "absent":
                self.dead.add(send.replica_id)
                self.deaths += failure is Failure.DIED
            self.paused.pop(send.replica_id, None)
        elif pause and send.replica_id in self.replicas:
            self.paused[send.replica_id] = self.now + pause
        request.errors += failure is Failure.ERROR
        request.losses += failure in LOSSES
        request.died += failure is Failure.DIED
        request.deaths += failure in LOSSES and computing
        unrelated = max(self.deaths - request.died, 0)
        poison = min(LIMITS.max_deaths + unrelated, 3 * LIMITS.max_deaths)
        if failure is Failure.ERROR and request.errors == LIMITS.max_errors:
            assert verdict is Verdict.RAISE
        elif failure in LOSSES and request.deaths >= poison:
            assert verdict is Verdict.POISON
        elif failure in LOSSES and request.losses == LIMITS.max_attempts:
            assert verdict is Verdict.EXHAUSTED
        else:
            assert verdict is Verdict.RESEND
            self.first.append(send.request_id)
            if failure is not Failure.FULL:
                request.tried.add(send.replica_id)
                self.resends += 1
            return
        self.forget(send.request_id)

    @rule()
    def expire(self) -> None:
        late = []
        for name, one in self.requests.items():
            if one.at is None or one.deadline > self.now:
                continue
            if self.heard.get(one.at, -inf) > one.deadline - LIMITS.attempt_timeout and one.renewals < 5:
                one.renewals += 1
                one.deadline = self.now + LIMITS.attempt_timeout
            else:
                late.append(name)
        overdue = self.table.expired(self.now)
        assert sorted(overdue) == sorted((name, self.requests[name].attempt, self.requests[name].at) for name in late)
        for request_id, attempt, replica_id in overdue:
            verdict = self.table.failed(request_id, attempt, Failure.TIMEOUT, self.now, pause=20.0)
            send = Send(request_id, attempt, replica_id, suspect=False, urgent=False)
            self.book_failure(send, Failure.TIMEOUT, 20.0, False, verdict)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(["never submitted", *sorted(self.requests)]))
        assert self.table.cancel(request_id) == (request_id in self.requests)
        if request_id in self.requests:
            self.forget(request_id)

    # What holds at any time -----------------------------------------------------------------------------------------

    @invariant()
    def the_books_are_exact(self) -> None:
        statistics, flying = self.table.statistics(), self.flying()
        assert statistics.replicas == len(self.replicas)
        assert statistics.waiting == len(self.first) + len(self.then)
        assert statistics.in_flight == len(flying)
        assert statistics.in_flight_bytes == sum(one.nbytes for one in flying)
        assert statistics.waiting + statistics.in_flight == len(self.requests)
        assert (statistics.answered, statistics.resends) == (self.answered, self.resends)
        assert (statistics.peak_in_flight, statistics.peak_bytes) == (self.peak, self.peak_bytes)
        assert f"{len(self.replicas)} replicas ({len(self.open())} open), {len(flying)} in flight" in repr(self.table)
        for name, request in self.requests.items():
            assert self.table.history(name) == request.tried
        for name in self.ever:
            assert self.table.knows(name) == (name in self.replicas)

    @invariant()
    def it_looks_at_the_clock_in_time(self) -> None:
        due = [one.deadline for one in self.flying() if one.deadline > self.now]
        if self.first or self.then:
            due += self.paused.values()
        looks_at = self.table.next_deadline()
        if due:
            assert looks_at is not None
            assert looks_at <= min(due)
        else:
            assert looks_at is None or looks_at <= self.now  # a deadline that has passed, and is not collected yet
