"""The replica's queue: any interleaving keeps its books, never mixes what must not be mixed, and is fair."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dinov3_ray.features import FeatureSpec
from dinov3_ray.pool.messages import RequestHeader
from dinov3_ray.pool.replica.queue import BatchQueue, QueuedRequest
from dinov3_ray.pool.spec import Batching

MAX_BATCH, MAX_WAIT, MAX_REQUESTS, MAX_BYTES = 8, 1.0, 6, 100
SPEC = FeatureSpec(cls=True)
CLIENTS = ("ada", "bob", "cyd")


def a_queue(mode: Batching, **bounds: int) -> BatchQueue:
    bounds = {"max_requests": 1000, "max_bytes": 10**9} | bounds
    return BatchQueue(mode, max_batch=MAX_BATCH, max_wait=MAX_WAIT, **bounds)


def a_request(
    ticket: int,
    client: str = "ada",
    key: str = "k",
    rows: int = 1,
    nbytes: int = 1,
    arrived: float = 0.0,
    urgent: bool = False,
    alone: bool = False,
) -> QueuedRequest:
    header = RequestHeader(str(ticket), client, SPEC, (key, True), rows, suspect=alone, urgent=urgent)
    return QueuedRequest(header, [np.empty((nbytes, 1, 1, 1), np.uint8)], lambda answer, arrays: None, arrived)


def tickets(batch: object) -> list[int]:
    assert isinstance(batch, list), batch
    return [int(request.header.request_id) for request in batch]


class BatchingMachine(RuleBasedStateMachine):
    """Against a plain list of what waits, in the order of arrival."""

    @initialize(mode=st.sampled_from(["exact", "dynamic", "deterministic"]))
    def begin(self, mode: Batching) -> None:
        self.mode = mode
        self.queue = a_queue(mode, max_requests=MAX_REQUESTS, max_bytes=MAX_BYTES)
        self.waiting: list[QueuedRequest] = []
        # How often another client was served while each one waited.
        self.passed_over: Counter[str] = Counter()
        self.tickets, self.now = 0, 0.0

    @rule(
        client=st.sampled_from(CLIENTS),
        key=st.sampled_from(["small", "large"]),
        rows=st.integers(1, MAX_BATCH),
        nbytes=st.sampled_from([0, 10, 40, 200]),
        urgent=st.booleans(),
        alone=st.booleans(),
    )
    def offer(self, client: str, key: str, rows: int, nbytes: int, urgent: bool, alone: bool) -> None:
        waiting = a_request(self.tickets, client, key, rows, nbytes, self.now, urgent, alone)
        self.tickets += 1
        full = len(self.waiting) >= MAX_REQUESTS or sum(one.nbytes for one in self.waiting) + nbytes > MAX_BYTES
        taken = self.queue.offer(waiting)
        assert taken == (not self.waiting or not full)
        if taken:
            self.waiting.append(waiting)

    @rule(seconds=st.sampled_from([0.3, 2.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def take(self) -> None:
        batch = self.queue.take(self.now)
        if not self.waiting:
            assert batch is None
            return
        if isinstance(batch, float):
            assert self.mode != "exact"
            # It waits for the company of one that has come within max_wait, and that could have some.
            assert batch > self.now
            assert any(batch == one.arrived + MAX_WAIT and not one.header.suspect for one in self.waiting)
            return
        assert batch is not None
        assert len(set(tickets(batch))) == len(batch) > 0
        assert all(one in self.waiting for one in batch)
        assert sum(one.header.rows for one in batch) <= MAX_BATCH
        assert len({one.key for one in batch}) == 1
        if self.mode == "exact" or any(one.header.suspect for one in batch):
            assert len(batch) == 1
        urgent = [one for one in self.waiting if one.header.urgent]
        assert batch[0] == (urgent[0] if urgent else self.first_of(batch[0].header.client_id))
        for one in batch:
            # Of what one client has waiting that may run in this batch, the oldest runs first.
            before = [
                o
                for o in self.waiting
                if (o.header.client_id, o.key, o.header.urgent) == (one.header.client_id, one.key, one.header.urgent)
            ]
            before = [
                o
                for o in before
                if int(o.header.request_id) < int(one.header.request_id)
                and not o.header.suspect
                and o.header.rows <= one.header.rows
            ]
            assert all(o in batch for o in before) or one is batch[0]
        served = {one.header.client_id for one in batch if not one.header.urgent}
        if batch[0].header.urgent:
            # It is nobody's turn, but who goes with it has had one.
            self.passed_over.subtract({client: self.passed_over[client] for client in served})
        else:
            self.count_turn(served)
        self.waiting = [one for one in self.waiting if one not in batch]

    def first_of(self, client: str) -> QueuedRequest:
        return next(one for one in self.waiting if one.header.client_id == client and not one.header.urgent)

    def count_turn(self, served: set[str]) -> None:
        """A client that has something waiting is passed over at most once by each of the others."""
        for client in CLIENTS:
            if client in served or all(one.header.client_id != client or one.header.urgent for one in self.waiting):
                self.passed_over[client] = 0
            else:
                self.passed_over[client] += 1
                assert self.passed_over[client] < len(CLIENTS), client

    @rule(client=st.sampled_from(CLIENTS))
    def forget(self, client: str) -> None:
        dropped = self.queue.forget(client)
        assert sorted(tickets(dropped)) == [
            int(one.header.request_id) for one in self.waiting if one.header.client_id == client
        ]
        self.waiting = [one for one in self.waiting if one.header.client_id != client]
        self.passed_over[client] = 0

    @invariant()
    def the_books_are_exact(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert self.queue.rows() == sum(one.header.rows for one in self.waiting)
        for client in CLIENTS:
            assert self.queue.rows(client) == sum(
                one.header.rows for one in self.waiting if one.header.client_id == client
            )
        assert self.queue.oldest() == min((one.arrived for one in self.waiting), default=None)
        clients = len({one.header.client_id for one in self.waiting})
        nbytes = sum(one.nbytes for one in self.waiting)
        assert repr(self.queue) == f"<BatchQueue {len(self.waiting)} requests of {clients} clients, {nbytes} bytes>"

    def teardown(self) -> None:
        """All that waits comes out, once, given time."""
        while self.waiting:
            self.now += MAX_WAIT
            before = len(self.waiting)
            self.take()
            assert len(self.waiting) < before


BatchingMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestAnyInterleaving = pytest.mark.slow(BatchingMachine.TestCase)


@pytest.mark.parametrize("mode", ["exact", "dynamic", "deterministic"])
def test_a_client_with_a_hundred_requests_does_not_starve_one_with_one(mode: Batching) -> None:
    queue = a_queue(mode)
    for ticket in range(100):
        queue.offer(a_request(ticket, "greedy", rows=MAX_BATCH))
    queue.take(0.0)
    for ticket in range(100, 105):
        queue.offer(a_request(ticket, "modest", rows=MAX_BATCH))
        assert ticket in tickets(queue.take(0.0)) + tickets(queue.take(0.0))


def test_small_requests_of_several_clients_share_a_batch_evenly() -> None:
    queue = a_queue("dynamic")
    for ticket in range(20):
        queue.offer(a_request(ticket, "greedy"))
    for ticket, client in ((20, "a"), (21, "b")):
        queue.offer(a_request(ticket, client))
    batch = queue.take(0.0)
    assert isinstance(batch, list)  # it is full: nothing to wait for
    assert Counter(one.header.client_id for one in batch) == {"greedy": 6, "a": 1, "b": 1}
    assert [int(one.header.request_id) for one in batch if one.header.client_id == "greedy"] == list(range(6))


def test_company_is_waited_for_until_the_batch_is_full_or_time_is_up() -> None:
    queue = a_queue("dynamic")
    queue.offer(a_request(0, rows=3, arrived=10.0))
    assert queue.take(10.5) == 11.0
    assert tickets(queue.take(11.0)) == [0]
    queue.offer(a_request(1, rows=3, arrived=20.0))
    assert queue.take(20.0) == 21.0
    queue.offer(a_request(2, "bob", rows=5, arrived=20.1))
    assert tickets(queue.take(20.1)) == [1, 2]


def test_requests_of_other_sizes_or_specs_are_not_mixed_and_have_their_turn() -> None:
    queue = a_queue("dynamic")
    for ticket in range(4):
        queue.offer(a_request(ticket, key=ticket % 2))
    queue.offer(a_request(4, "bob", key=1))
    assert tickets(queue.take(MAX_WAIT)) == [0, 2]
    assert sorted(tickets(queue.take(MAX_WAIT))) == [1, 3, 4]
    assert queue.take(MAX_WAIT) is None


def test_a_suspect_runs_alone_and_what_was_sent_before_runs_first() -> None:
    queue = a_queue("dynamic")
    queue.offer(a_request(0))
    queue.offer(a_request(1, "bob"))
    queue.offer(a_request(2, "cyd", urgent=True, alone=True))
    assert tickets(queue.take(0.0)) == [2]
    assert tickets(queue.take(MAX_WAIT)) == [0, 1]


def test_a_full_queue_turns_away_and_changes_nothing() -> None:
    queue = a_queue("exact", max_requests=2, max_bytes=100)
    assert queue.offer(a_request(0, nbytes=500))  # an empty queue takes any size, or it could never run
    assert not queue.offer(a_request(1, nbytes=1))
    queue.take(0.0)
    assert queue.offer(a_request(2, nbytes=60))
    assert not queue.offer(a_request(3, nbytes=60))
    assert queue.offer(a_request(4, nbytes=40))
    assert not queue.offer(a_request(5, nbytes=0))
    assert (len(queue), queue.rows()) == (2, 2)
