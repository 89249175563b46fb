"""A batch cut into requests, each with a private copy of its images to send from."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dinov3_ray.features import FeatureSpec
from dinov3_ray.images import ImageBatch
from dinov3_ray.pool.handle import Handle, Part
from dinov3_ray.pool.messages import RequestHeader
from dinov3_ray.pool.transport import Transport
from dinov3_ray.pool.wire import pack_images

__all__ = ["Outbox", "Outgoing"]


@dataclass(slots=True)
class Outgoing:
    """A request that the client holds until it is answered: what to send, and how to cancel it where it is."""

    part: Part
    header: RequestHeader
    staged: list[Any]
    nbytes: int
    cancel: Callable[[], None] | None = None
    error: BaseException | None = None
    sent_at: float = 0.0


class Outbox:
    """Cuts batches and keeps count of the copies; callers of several threads may use it at the same time.

    Args:
        max_bytes: up to which copies go to the object store at once; beyond, they wait in this process's memory.
    """

    def __init__(self, transport: Transport, client_id: str, max_bytes: int) -> None:
        self._transport = transport
        self._client_id = client_id
        self._max_bytes = max_bytes
        self._bytes = 0
        self._lock = threading.Lock()

    def cut(self, handle: Handle, images: ImageBatch, spec: FeatureSpec, max_batch: int) -> list[Outgoing]:
        """Requests of at most ``max_batch`` images each; their parts are entered in ``handle``."""
        requests: list[Outgoing] = []
        try:
            for start in range(0, len(images), max_batch):
                stop = min(start + max_batch, len(images))
                part = Part(handle, f"{self._client_id}/{handle.index}/{start}", start, stop)
                layout, arrays = pack_images(images.rows(start, stop))
                header = RequestHeader(part.request_id, self._client_id, spec, layout, stop - start)
                nbytes = sum(array.nbytes for array in arrays)
                staged = self._transport.stage(arrays, send_now=self._bytes + nbytes <= self._max_bytes)
                requests.append(Outgoing(part, header, staged, nbytes))
                self._count(nbytes)
                handle.parts.append(part)
        except BaseException:
            self.release(requests)
            raise
        return requests

    def release(self, requests: list[Outgoing]) -> None:
        """Their copies are no longer held."""
        self._count(-sum(request.nbytes for request in requests))

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._bytes += nbytes
