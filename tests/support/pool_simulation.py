"""A discrete-event simulation of a pool: real routing tables, simulated replicas and time.

Each client has a table of its own. It knows what it has in flight itself, and what replicas tell it with their answers;
nothing else, as in a real pool.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass, field
from math import exp, inf, log
from typing import Self

from dinov3_ray.pool.client.balancer import KnownReplica
from dinov3_ray.pool.client.routing_table import Limits, RoutingTable

ROWS = 8  # of each request


@dataclass(slots=True)
class SimulatedReplica:
    """One that computes one request after the other, in the order of arrival."""

    seconds_per_row: float
    queue: deque[tuple[int, str]] = field(default_factory=deque)  # (client, request)
    busy: bool = False
    busy_seconds: float = 0.0
    longest_queue: int = 0


def skewed_speeds(replicas: int, *, ratio: float = 10.0, seed: int = 1) -> list[float]:
    """Seconds per row of each replica: log-normal; the slowest takes at most ``ratio`` times as long as the fastest."""
    generator = random.Random(seed)
    normal = [min(max(generator.gauss(0, 1), -2), 2) for _ in range(replicas)]
    return [0.040 / 32 * exp(value * log(ratio) / 4) for value in normal]


class Simulation:
    """``requests`` requests of ``clients`` clients, arriving at random, at a share ``load`` of what the pool can do.

    Args:
        seconds_per_row: of each replica; what a request takes varies around it by ``noise`` (a share).
        choice: ``tables`` (the clients' real ones), ``random`` (any replica), or ``ideal``: one queue for all, from
            which the fastest idle replica takes, which no client that decides for itself can reach.
    """

    def __init__(
        self,
        seconds_per_row: list[float],
        *,
        clients: int,
        requests: int,
        load: float,
        choice: str = "tables",
        noise: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.replicas = [SimulatedReplica(seconds) for seconds in seconds_per_row]
        self.choice = choice
        self.noise = noise
        self.random = random.Random(seed)
        self.arrivals_left = requests
        self.gap = ROWS / (load * sum(1 / seconds for seconds in seconds_per_row))
        self.clients = clients
        self.sent: dict[str, float] = {}
        self.latencies: list[float] = []
        self.now = 0.0
        self.events: list[tuple[float, int, int, str]] = []  # (time, replica or -1, client, request)
        self.central: deque[tuple[int, str]] = deque()
        self.idle = [(seconds, index) for index, seconds in enumerate(seconds_per_row)]
        heapq.heapify(self.idle)
        view = [KnownReplica(str(index), False, None) for index in range(len(self.replicas))]
        self.tables: list[RoutingTable] = []
        if choice == "tables":
            limits = Limits(attempt_timeout=inf)
            for client in range(clients):
                table = RoutingTable(limits, window=3, seed=seed + client)
                table.set_replicas(view)
                self.tables.append(table)

    @property
    def mean_latency(self) -> float:
        """Seconds from a request's submission to its answer."""
        return sum(self.latencies) / len(self.latencies)

    @property
    def imbalance(self) -> float:
        """The busiest replica's seconds of work against the mean: 1 if each got work in proportion to its speed."""
        seconds = [replica.busy_seconds for replica in self.replicas]
        return max(seconds) * len(seconds) / sum(seconds)

    @property
    def longest_queue(self) -> int:
        return max(replica.longest_queue for replica in self.replicas)

    def run(self) -> Self:
        self._plan_arrival()
        while self.events:
            self.now, replica, client, request_id = heapq.heappop(self.events)
            if replica < 0:
                self._arrive(client, request_id)
                self._plan_arrival()
            else:
                self._finish(replica, client, request_id)
        return self

    def _plan_arrival(self) -> None:
        if self.arrivals_left:
            self.arrivals_left -= 1
            due = self.now + self.random.expovariate(1 / self.gap)
            client = int(self.random.random() * self.clients)
            heapq.heappush(self.events, (due, -1, client, str(self.arrivals_left)))

    def _arrive(self, client: int, request_id: str) -> None:
        self.sent[request_id] = self.now
        if self.choice == "tables":
            self.tables[client].submit(request_id, rows=ROWS, nbytes=1)
            self._send(client)
        elif self.choice == "random":
            self._enqueue(int(self.random.random() * len(self.replicas)), client, request_id)
        elif self.idle:
            self._enqueue(heapq.heappop(self.idle)[1], client, request_id)
        else:
            self.central.append((client, request_id))

    def _send(self, client: int) -> None:
        for send in self.tables[client].next_sends(self.now):
            self._enqueue(int(send.replica_id), client, send.request_id)

    def _enqueue(self, index: int, client: int, request_id: str) -> None:
        replica = self.replicas[index]
        replica.queue.append((client, request_id))
        replica.longest_queue = max(replica.longest_queue, len(replica.queue))
        if not replica.busy:
            self._begin(index)

    def _begin(self, index: int) -> None:
        replica = self.replicas[index]
        replica.busy = True
        client, request_id = replica.queue.popleft()
        seconds = replica.seconds_per_row * ROWS * self.random.uniform(1 - self.noise, 1 + self.noise)
        replica.busy_seconds += seconds
        heapq.heappush(self.events, (self.now + seconds, index, client, request_id))

    def _finish(self, index: int, client: int, request_id: str) -> None:
        replica = self.replicas[index]
        replica.busy = False
        self.latencies.append(self.now - self.sent.pop(request_id))
        if self.choice == "tables":
            others = ROWS * sum(other != client for other, _ in replica.queue)
            # The noise of the request itself is not known here; the mean stands in for it.
            seconds = replica.seconds_per_row * ROWS
            first = self.tables[client].answered(request_id, str(index), self.now, seconds=seconds, other_rows=others)
            assert first
            self._send(client)
        elif self.choice == "ideal":
            heapq.heappush(self.idle, (replica.seconds_per_row, index))
            if self.central:
                self._enqueue(heapq.heappop(self.idle)[1], *self.central.popleft())
        if replica.queue and not replica.busy:
            self._begin(index)
