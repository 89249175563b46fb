"""A submitted batch: what the caller waits on, and where the router puts the parts as they arrive.

How many bytes a result is going to have, before it is there: what the byte budget needs to know.

A batch cut into requests, each with a private copy of its images to send from.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dinov3_ray.errors import ForkedProcessError, PoolTimeoutError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import ImageBatch
from dinov3_ray.interrupts import wait
from dinov3_ray.pool.messages import Answer, Array, RequestHeader, TeacherInfo
from dinov3_ray.pool.transport.protocol import Transport
from dinov3_ray.pool.transport.wire import pack_images, unpack_features

__all__ = ["Handle", "Outbox", "Outgoing", "Part", "ResultSizes"]


log = logging.getLogger("dinov3_ray")


class Part:
    """Rows ``start`` to ``stop`` of a batch, as one request."""

    def __init__(self, handle: Handle, request_id: str, start: int, stop: int) -> None:
        self.handle = handle
        self.request_id = request_id
        self.start, self.stop = start, stop
        self.answer: Answer | None = None
        self.arrays: Sequence[Array] = ()

    @property
    def fingerprint(self) -> str | None:
        return self.answer.fingerprint if self.answer else None


class Handle:
    """A batch that is being answered.

    Attributes:
        index: the batch's number among those that this teacher was given, from 0.
        spec: what was asked for.
    """

    def __init__(self, index: int, rows: int, spec: FeatureSpec, cancel: Callable[[Handle], None]) -> None:
        self.index = index
        self.spec = spec
        self.parts: list[Part] = []
        #: What must live as long as the batch is under way; see ``RemoteTeacher.submit``.
        self.owner: object = None
        self._pid = os.getpid()
        self._rows = rows
        self._cancel = cancel
        self._finished = threading.Event()
        self._taking = threading.Lock()
        self._callbacks: list[Callable[[Handle], None]] = []
        self._features: Features | None = None
        self._error: BaseException | None = None

    def result(self, timeout: float | None = None) -> Features:
        """The features, in the order of the images.

        Args:
            timeout: seconds to wait here. None waits as long as the pool makes progress: a pool without replicas, or a
                replica that does not answer, ends the wait by itself (see ``RemoteTeacher(timeout=...)``).

        Raises:
            PoolTimeoutError: ``timeout`` passed; the batch is still in flight and may be waited for again.
            Exception: what the teacher raised, as itself; or the reason why no replica could answer.
        """
        if os.getpid() != self._pid:
            raise ForkedProcessError(
                f"batch {self.index} was submitted in process {self._pid}; its fork {os.getpid()} would wait for ever"
            )
        if not wait(self._finished.wait, timeout):
            done = sum(part.answer is not None for part in self.parts)
            raise PoolTimeoutError(
                f"batch {self.index} ({self._rows} images) was not answered within timeout={timeout} s: "
                f"{done} of {len(self.parts)} parts are there"
            )
        if self._error is not None:
            raise self._error
        with self._taking:
            if self._features is None:
                # Tensors made in inference mode could not be saved for backward, whoever asks for them.
                with torch.inference_mode(False), torch.no_grad():
                    self._features = Features.cat([_unpack(part) for part in self.parts])
                self.parts = []  # the arrays live on in the features alone
            return self._features

    def done(self) -> bool:
        """Whether :meth:`result` would return or raise at once."""
        return self._finished.is_set()

    def exception(self) -> BaseException | None:
        """What :meth:`result` would raise, if the batch has failed; None while it is under way or when it is done."""
        return self._error

    def cancel(self) -> None:
        """Give the batch up: what is queued is dropped, and :meth:`result` raises PoolClosedError."""
        if not self.done():
            self._cancel(self)

    def on_done(self, callback: Callable[[Handle], None]) -> None:
        """Call ``callback(handle)`` when the batch is answered or has failed, from another thread or at once."""
        with self._taking:
            if not self.done():
                self._callbacks.append(callback)
                return
        callback(self)

    def finish(self, error: BaseException | None = None) -> None:
        """For the router: all parts are there, or the batch has failed."""
        with self._taking:
            if self._finished.is_set():
                return
            self._error = error
            self._finished.set()
            self.owner = None
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                log.exception("a callback of %r failed", self)

    def __repr__(self) -> str:
        state = "failed" if self._error else "done" if self.done() else "in flight"
        return f"<Handle of batch {self.index}: {self._rows} images, {state}>"


def _unpack(part: Part) -> Features:
    assert part.answer is not None
    return unpack_features(part.answer.layout, part.arrays, part.answer.fingerprint)


_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_UNKNOWN_ROW_BYTES = 2**20


class ResultSizes:
    """Bytes a row for each spec: computed from the teacher's shapes at first, measured from the first answer on."""

    def __init__(self) -> None:
        self._info: TeacherInfo | None = None
        self._row_bytes: dict[FeatureSpec, float] = {}

    def learn_teacher(self, info: TeacherInfo | None) -> None:
        if info != self._info:
            self._info = info
            self._row_bytes.clear()  # another teacher, other sizes

    def learn(self, spec: FeatureSpec, rows: int, nbytes: int) -> None:
        self._row_bytes[spec] = nbytes / rows

    def expect(self, spec: FeatureSpec, rows: int) -> int:
        """Bytes that the result of ``rows`` images is expected to have."""
        known = self._row_bytes.get(spec)
        return int(rows * (known if known is not None else self._guess(spec)))

    def _guess(self, spec: FeatureSpec) -> int:
        info = self._info
        if info is None or info.hidden_size is None or info.grid_size is None:
            return _UNKNOWN_ROW_BYTES
        height, width = spec.map_size or info.grid_size
        maps = int(spec.feature_map) + len(spec.layers)
        tokens = int(spec.cls) + int(spec.registers) * (info.num_register_tokens or 0) + maps * height * width
        scale = _ITEM_BYTES["float32"] if spec.dtype == "int8" else 0  # one a token
        return tokens * (info.hidden_size * _item_bytes(spec.dtype, info.dtype) + scale)


def _item_bytes(wanted: str, computed: str | None) -> int:
    native = _ITEM_BYTES.get((computed or "float32").removeprefix("torch."), 4)
    return min(native, _ITEM_BYTES.get(wanted, native))


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
