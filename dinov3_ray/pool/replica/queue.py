"""The queue of a replica: which of the waiting requests it computes next. Pure: no threads, no clock, no Ray.

Clients are served in turn, one forward pass each, so that a client with a hundred requests waiting does not starve
one with a single request. Requests that were sent before and not answered go first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from dinov3_ray.pool.messages import Answer, Array, RequestHeader
from dinov3_ray.pool.spec import Batching

__all__ = ["BatchQueue", "Done", "QueuedRequest"]


Done = Callable[[Answer, list[Array]], None]
"""Called once with a request's answer and its arrays."""


@dataclass(frozen=True, slots=True, eq=False)
class QueuedRequest:
    """A request as a replica holds it, from its arrival until its answer."""

    header: RequestHeader
    arrays: Sequence[Array]
    done: Done
    arrived: float

    @property
    def key(self) -> Hashable:
        """What may be computed together: requests of different specs, image sizes or dtypes are never mixed."""
        return self.header.spec, self.header.images, tuple(array.shape[-3:] for array in self.arrays)

    @property
    def nbytes(self) -> int:
        """Of its images."""
        return sum(array.nbytes for array in self.arrays)


class BatchQueue:
    """A bounded queue that hands out batches of at most ``max_batch`` rows, client by client.

    It looks at headers, sizes and times of arrival only.
    """

    def __init__(self, mode: Batching, *, max_batch: int, max_wait: float, max_requests: int, max_bytes: int) -> None:
        self._mode = mode
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._urgent: deque[QueuedRequest] = deque()
        self._clients: OrderedDict[str, deque[QueuedRequest]] = OrderedDict()
        self._count = 0
        self._bytes = 0
        self._rows: dict[str, int] = {}

    def offer(self, request: QueuedRequest) -> bool:
        """Queue ``request``; False, and nothing changed, if the queue is full. An empty queue takes any size."""
        over = self._count >= self._max_requests or self._bytes + request.nbytes > self._max_bytes
        if self._count and over:
            return False
        if request.header.urgent:
            self._urgent.append(request)
        else:
            self._clients.setdefault(request.header.client_id, deque()).append(request)
        self._count += 1
        self._bytes += request.nbytes
        self._rows[request.header.client_id] = self._rows.get(request.header.client_id, 0) + request.header.rows
        return True

    def take(self, now: float) -> list[QueuedRequest] | float | None:
        """The next batch; or the time until which to wait for company; or None if nothing waits."""
        head = self._head()
        if head is None:
            return None
        if self._mode == "exact" or head.header.suspect or head.header.rows >= self._max_batch:
            return [self._remove(head)]
        batch = self._company(head)
        deadline = head.arrived + self._max_wait
        if sum(request.header.rows for request in batch) < self._max_batch and now < deadline:
            return deadline
        return [self._remove(request) for request in batch]

    def forget(self, client_id: str) -> list[QueuedRequest]:
        """Drop all that ``client_id`` has waiting, and return it."""
        dropped = [request for request in self._urgent if request.header.client_id == client_id]
        dropped += self._clients.get(client_id, ())
        for request in dropped:
            self._remove(request)
        return dropped

    def clear(self) -> list[QueuedRequest]:
        """Drop all that waits, and return it."""
        return [request for client_id in list(self._rows) for request in self.forget(client_id)]

    def rows(self, client_id: str | None = None) -> int:
        """Rows waiting, of one client or of all."""
        return sum(self._rows.values()) if client_id is None else self._rows.get(client_id, 0)

    def oldest(self) -> float | None:
        """When the request that has waited longest arrived."""
        heads = [queue[0].arrived for queue in self._clients.values()]
        return min([request.arrived for request in self._urgent] + heads, default=None)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"<BatchQueue {self._count} requests of {len(self._rows)} clients, {self._bytes} bytes>"

    def _head(self) -> QueuedRequest | None:
        if self._urgent:
            return self._urgent[0]
        return next((queue[0] for queue in self._clients.values()), None)

    def _company(self, head: QueuedRequest) -> list[QueuedRequest]:
        """``head`` and what may share its pass, one request per client and round, up to ``max_batch`` rows."""
        batch, rows = [head], head.header.rows
        queues = [self._urgent, *self._clients.values()]
        columns = [[request for request in queue if request is not head] for queue in queues]
        for depth in range(max(map(len, columns), default=0)):
            for column in columns:
                if depth >= len(column):
                    continue
                request = column[depth]
                fits = rows + request.header.rows <= self._max_batch
                if request.key == head.key and not request.header.suspect and fits:
                    batch.append(request)
                    rows += request.header.rows
            if rows == self._max_batch:
                break
        return batch

    def _remove(self, request: QueuedRequest) -> QueuedRequest:
        if request.header.urgent:
            self._urgent.remove(request)
        else:
            queue = self._clients[request.header.client_id]
            queue.remove(request)
            if queue:
                self._clients.move_to_end(request.header.client_id)  # this client has had its turn
            else:
                del self._clients[request.header.client_id]
        self._count -= 1
        self._bytes -= request.nbytes
        self._rows[request.header.client_id] -= request.header.rows
        if not self._rows[request.header.client_id]:
            del self._rows[request.header.client_id]
        return request
