"""A client's requests: a batch is cut into them, each is sent until it is answered, and their answers are joined.

The caller waits on the batch's :class:`Handle`. The router's thread owns its :class:`Request` objects: it sends them,
sends them again, and puts their answers into them.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from dinov3_ray.config.preprocessing import Size
from dinov3_ray.errors import ForkedProcessError, PoolTimeoutError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import ImageBatch
from dinov3_ray.interrupts import wait
from dinov3_ray.pool.messages import Answer, Array, RequestHeader, TeacherInfo
from dinov3_ray.pool.transport.protocol import Transport
from dinov3_ray.pool.transport.wire import pack_images, unpack_features

__all__ = ["Handle", "Request", "RequestCutter", "ResultSizes"]


class Request:
    """Images ``start`` to ``stop`` (exclusive) of a batch: what to send, and what came back.

    Attributes:
        header: what a replica gets to know of it.
        view: (H, W) of its largest image.
        staged: the private copy of its images, as the transport sends it.
        nbytes: bytes of that copy.
        sent_at: when it was last sent; seconds of the monotonic clock.
        cancel_send: cancels the last send.
        error: what a replica raised on it last.
        answer, arrays: the answer, when it is there.
    """

    def __init__(
        self,
        handle: Handle,
        header: RequestHeader,
        view: Size,
        staged: list[Any],
        nbytes: int,
        start: int,
        stop: int,
    ) -> None:
        self.handle = handle
        self.header = header
        self.view = view
        self.staged = staged
        self.nbytes = nbytes
        self.start, self.stop = start, stop
        self.sent_at = 0.0
        self.cancel_send: Callable[[], None] | None = None
        self.error: BaseException | None = None
        self.answer: Answer | None = None
        self.arrays: Sequence[Array] = ()

    @property
    def request_id(self) -> str:
        return self.header.request_id

    @property
    def fingerprint(self) -> str | None:
        """The teacher that made its answer; None without an answer."""
        return self.answer.fingerprint if self.answer else None

    def features(self) -> Features:
        """The answer's features."""
        assert self.answer is not None
        return unpack_features(self.answer.layout, self.arrays, self.answer.fingerprint)

    def describe(self, pool: str) -> str:
        """Its batch and images in words, for an error."""
        return f"batch {self.handle.index} (rows {self.start} to {self.stop - 1}) of pool {pool!r}"


class Handle:
    """A submitted batch. The caller waits on it.

    Attributes:
        index: the batch's number among those that this teacher was given, from 0.
    """

    def __init__(self, index: int, rows: int, cancel: Callable[[Handle], None]) -> None:
        self.index = index
        #: The router's; the last one leaves when its features are taken.
        self.requests: list[Request] = []
        #: What must live as long as the batch is in flight; see ``RemoteTeacher.submit``.
        self.owner: object = None
        self._pid = os.getpid()
        self._rows = rows
        self._cancel = cancel
        self._finished = threading.Event()
        self._joining = threading.Lock()
        self._features: Features | None = None
        self._error: BaseException | None = None

    def result(self, timeout: float | None = None) -> Features:
        """The features, in the order of the images.

        Args:
            timeout: seconds to wait here. None waits as long as the pool makes progress: a pool without replicas, or a
                replica that does not answer, ends the wait by itself (see ``RemoteTeacher(timeout=...)``).

        Raises:
            PoolTimeoutError: ``timeout`` passed; the batch is still in flight and may be waited for again.
            PoolClosedError: the batch was cancelled, or its client closed.
            Exception: what the teacher raised, as itself; or the reason why no replica could answer.
        """
        if os.getpid() != self._pid:
            raise ForkedProcessError(
                f"batch {self.index} was submitted in process {self._pid}; its fork {os.getpid()} would wait for ever"
            )
        if not wait(self._finished.wait, timeout):
            done = sum(request.answer is not None for request in self.requests)
            raise PoolTimeoutError(
                f"batch {self.index} ({self._rows} images) was not answered within timeout={timeout} s: "
                f"{done} of {len(self.requests)} parts are there"
            )
        if self._error is not None:
            raise self._error
        with self._joining:
            if self._features is None:
                # Tensors made in inference mode could not be saved for backward, whoever asks for them.
                with torch.inference_mode(False), torch.no_grad():
                    self._features = Features.cat([request.features() for request in self.requests])
                self.requests = []  # the arrays live on in the features alone
            return self._features

    def done(self) -> bool:
        """Whether :meth:`result` would return or raise at once."""
        return self._finished.is_set()

    def cancel(self) -> None:
        """Give the batch up: what is queued is dropped, and :meth:`result` raises PoolClosedError."""
        if not self.done():
            self._cancel(self)

    def finish(self, error: BaseException | None = None) -> None:
        """For the router: all answers are there, or the batch has failed. Only the first call counts."""
        if not self._finished.is_set():
            self._error = error
            self._finished.set()
            self.owner = None

    def __repr__(self) -> str:
        state = "in flight" if not self.done() else "failed" if self._error else "done"
        return f"<Handle of batch {self.index}: {self._rows} images, {state}>"


class RequestCutter:
    """Cuts batches into requests, and counts the bytes of the copies that they hold. Safe to use from several threads.

    Args:
        max_bytes: up to which copies go to the object store at once. Beyond it, they wait in this process's memory.
    """

    def __init__(self, transport: Transport, client_id: str, max_bytes: int) -> None:
        self._transport = transport
        self._client_id = client_id
        self._max_bytes = max_bytes
        self._bytes = 0
        self._lock = threading.Lock()

    def cut(self, handle: Handle, images: ImageBatch, spec: FeatureSpec, max_batch: int) -> list[Request]:
        """Requests of at most ``max_batch`` images each, which ``handle`` gets too; images are copied here."""
        requests: list[Request] = []
        try:
            for start in range(0, len(images), max_batch):
                stop = min(start + max_batch, len(images))
                part = images.rows(start, stop)
                layout, arrays = pack_images(part)
                request_id = f"{self._client_id}/{handle.index}/{start}"
                header = RequestHeader(request_id, self._client_id, spec, layout, stop - start)
                nbytes = sum(array.nbytes for array in arrays)
                staged = self._transport.stage(arrays, send_now=self._bytes + nbytes <= self._max_bytes)
                view = max(part.sizes, key=math.prod)
                requests.append(Request(handle, header, view, staged, nbytes, start, stop))
                self._count(nbytes)
        except BaseException:
            self.release(requests)
            raise
        handle.requests = list(requests)
        return requests

    def release(self, requests: Iterable[Request]) -> None:
        """Drop the copies of ``requests``: they are not sent again."""
        for request in requests:
            request.staged = []
            self._count(-request.nbytes)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._bytes += nbytes


_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_UNKNOWN_ROW_BYTES = 2**20
_MOST_SIZES = 1000  # of specs and image sizes: those of a training run are few


class ResultSizes:
    """How many bytes results will have, for the byte budget: one figure per image for each spec and input size.

    The figure is computed from the teacher's shapes at first, and measured from the first answer on.
    """

    def __init__(self) -> None:
        self._info: TeacherInfo | None = None
        self._row_bytes: dict[tuple[FeatureSpec, Size], float] = {}

    def learn_teacher(self, info: TeacherInfo | None) -> None:
        if info != self._info:
            self._info = info
            self._row_bytes.clear()  # another teacher, other sizes

    def learn(self, request: Request, nbytes: int) -> None:
        """Note that the result of ``request`` had ``nbytes``."""
        if len(self._row_bytes) >= _MOST_SIZES:
            self._row_bytes.clear()
        header = request.header
        self._row_bytes[header.spec, self._input_size(request.view)] = nbytes / header.rows

    def expect(self, request: Request) -> int:
        """Bytes that the result of ``request`` is expected to have."""
        spec, size = request.header.spec, self._input_size(request.view)
        known = self._row_bytes.get((spec, size))
        return int(request.header.rows * (known if known is not None else self._guess(spec, size)))

    def _input_size(self, view: Size) -> Size:
        """Of the teacher; the images' own where it does not say."""
        rule = None if self._info is None else self._info.preprocessing
        return view if rule is None else rule.input_size(view)

    def _guess(self, spec: FeatureSpec, size: Size) -> int:
        info = self._info
        if info is None or info.hidden_size is None or info.grid_size is None:
            return _UNKNOWN_ROW_BYTES
        grid = info.grid_size
        if info.preprocessing is not None:
            grid = size[0] // info.patch_size, size[1] // info.patch_size
        height, width = spec.map_size or grid
        maps = int(spec.feature_map) + len(spec.layers)
        tokens = int(spec.cls) + int(spec.registers) * (info.num_register_tokens or 0) + maps * height * width
        scale = _ITEM_BYTES["float32"] if spec.dtype == "int8" else 0  # one per token
        return tokens * (info.hidden_size * _item_bytes(spec.dtype, info.dtype) + scale)


def _item_bytes(wanted: str, computed: str | None) -> int:
    native = _ITEM_BYTES.get((computed or "float32").removeprefix("torch."), 4)
    return min(native, _ITEM_BYTES.get(wanted, native))
