"""Which of the waiting requests a replica computes next. Pure: no threads, no clock of its own, no Ray.

Clients are served in turn, one forward pass each, so that a client with a hundred requests waiting does not starve
one with a single request. Requests that were sent before and not answered go first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass

from dinov3_ray.pool.spec import Batching

__all__ = ["BatchQueue", "Waiting"]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the queue.

    ``key`` says what may be computed together: requests of different specs, image sizes or dtypes are never mixed.
    ``alone`` keeps a request out of any company.
    """

    ticket: int
    client_id: str
    key: Hashable
    rows: int
    nbytes: int
    arrived: float
    urgent: bool = False
    alone: bool = False


class BatchQueue:
    """A bounded queue that hands out batches of at most ``max_batch`` rows, client by client.

    It knows neither images nor results; its owner looks those up by ``ticket``.
    """

    def __init__(self, mode: Batching, *, max_batch: int, max_wait: float, max_requests: int, max_bytes: int) -> None:
        self._mode = mode
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._urgent: deque[Waiting] = deque()
        self._clients: OrderedDict[str, deque[Waiting]] = OrderedDict()
        self._count = 0
        self._bytes = 0
        self._rows: dict[str, int] = {}

    def offer(self, waiting: Waiting) -> bool:
        """Queue ``waiting``; False, and nothing changed, if the queue is full. An empty queue takes any size."""
        over = self._count >= self._max_requests or self._bytes + waiting.nbytes > self._max_bytes
        if self._count and over:
            return False
        if waiting.urgent:
            self._urgent.append(waiting)
        else:
            self._clients.setdefault(waiting.client_id, deque()).append(waiting)
        self._count += 1
        self._bytes += waiting.nbytes
        self._rows[waiting.client_id] = self._rows.get(waiting.client_id, 0) + waiting.rows
        return True

    def take(self, now: float) -> list[Waiting] | float | None:
        """The next batch; or the time until which to wait for company; or None if nothing waits."""
        head = self._head()
        if head is None:
            return None
        if self._mode == "exact" or head.alone or head.rows >= self._max_batch:
            return [self._remove(head)]
        batch = self._company(head)
        deadline = head.arrived + self._max_wait
        if sum(waiting.rows for waiting in batch) < self._max_batch and now < deadline:
            return deadline
        return [self._remove(waiting) for waiting in batch]

    def forget(self, client_id: str) -> list[Waiting]:
        """Drop all that ``client_id`` has waiting, and return it."""
        dropped = [waiting for waiting in self._urgent if waiting.client_id == client_id]
        dropped += self._clients.get(client_id, ())
        for waiting in dropped:
            self._remove(waiting)
        return dropped

    def rows(self, client_id: str | None = None) -> int:
        """Rows waiting, of one client or of all."""
        return sum(self._rows.values()) if client_id is None else self._rows.get(client_id, 0)

    def oldest(self) -> float | None:
        """When the request that has waited longest arrived."""
        heads = [queue[0].arrived for queue in self._clients.values()]
        return min([waiting.arrived for waiting in self._urgent] + heads, default=None)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"<BatchQueue {self._count} requests of {len(self._rows)} clients, {self._bytes} bytes>"

    def _head(self) -> Waiting | None:
        if self._urgent:
            return self._urgent[0]
        return next((queue[0] for queue in self._clients.values()), None)

    def _company(self, head: Waiting) -> list[Waiting]:
        """``head`` and what may run beside it, one request a client and round, up to ``max_batch`` rows."""
        batch, rows = [head], head.rows
        queues = [self._urgent, *self._clients.values()]
        columns = [[waiting for waiting in queue if waiting is not head] for queue in queues]
        for depth in range(max(map(len, columns), default=0)):
            for column in columns:
                if depth >= len(column):
                    continue
                waiting = column[depth]
                if waiting.key == head.key and not waiting.alone and rows + waiting.rows <= self._max_batch:
                    batch.append(waiting)
                    rows += waiting.rows
            if rows == self._max_batch:
                break
        return batch

    def _remove(self, waiting: Waiting) -> Waiting:
        if waiting.urgent:
            self._urgent.remove(waiting)
        else:
            queue = self._clients[waiting.client_id]
            queue.remove(waiting)
            if queue:
                self._clients.move_to_end(waiting.client_id)  # this client has had its turn
            else:
                del self._clients[waiting.client_id]
        self._count -= 1
        self._bytes -= waiting.nbytes
        self._rows[waiting.client_id] -= waiting.rows
        if not self._rows[waiting.client_id]:
            del self._rows[waiting.client_id]
        return waiting
