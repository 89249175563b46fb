"""A submitted batch: what the caller waits on, and where the router puts the parts as they arrive."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence

import torch

from dinov3_ray.errors import ForkedProcessError, PoolTimeoutError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.pool.messages import Answer
from dinov3_ray.pool.wire import Array, unpack_features
from dinov3_ray.waiting import wait

__all__ = ["Handle", "Part"]

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
