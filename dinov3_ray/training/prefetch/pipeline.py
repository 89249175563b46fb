"""The pipeline of a prefetch: batches pass through the teachers in order, and targets go to the trainer's device.

It does not depend on Ray: to it, a pool's client is a :class:`Submitter`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from dinov3_ray.errors import ConfigError, PoolClosedError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import Images
from dinov3_ray.interrupts import wait
from dinov3_ray.model.device import as_device, settle_thread
from dinov3_ray.model.upload import Pending, Upload
from dinov3_ray.teacher import Extractor
from dinov3_ray.training.prefetch.routes import split_images
from dinov3_ray.watch import TeacherWatch

__all__ = ["Delivered", "Delivery", "LocalSource", "Pipeline", "Submitted", "Submitter", "as_source"]


P = ParamSpec("P")
R = TypeVar("R")

_DELIVERED_AHEAD = 2  # batches whose targets are copied to the trainer's device ahead: one in use, one in copy
_CANCEL_SECONDS = 5.0


class Submitted(Protocol):
    """A batch in flight."""

    def result(self, timeout: float | None = None) -> Features: ...

    def done(self) -> bool: ...

    def cancel(self) -> None: ...


class Submitter(Protocol):
    """A teacher that accepts batches ahead of time.

    It may also have ``statistics()``, with ``resends`` in the result, and ``count_step(waited, seconds)``, which is
    called for each step of a loop over its targets. Both are looked up by name.
    """

    @property
    def parallelism(self) -> int:
        """Batches that it can usefully have in flight now."""
        ...

    def submit(self, images: Images, spec: FeatureSpec) -> Submitted: ...


@dataclass(slots=True)
class _Entry:
    sent: Future[dict[str, Submitted]]
    delivered: Future[Delivered] | None = None


class Pipeline:
    """A first-in, first-out queue: the images of a batch enter, and its targets leave.

    Two threads do the work beside the trainer's. The first sends batches to the teachers, which copies them. The second
    receives the results and copies them to the device; for the next two batches only, to save the device's memory. A
    teacher of this process computes in the second thread.

    If all teachers compute on the accelerator that the targets are for, there are no threads. That device does one
    thing at a time and launching work does not wait, so that threads would gain nothing and would disturb (the GIL,
    CUDA graphs).

    Args:
        sources: the teachers by name.
        specs: what each computes, by name.
        device: where targets must be.
    """

    def __init__(
        self, sources: Mapping[str, Submitter], specs: Mapping[str, FeatureSpec], device: torch.device | None
    ) -> None:
        self._sources, self._specs = sources, specs
        self._entries: deque[_Entry] = deque()
        # What was sent, in the same order. The sending thread writes it, which Ctrl-C does not interrupt: a Ctrl-C in
        # put() may lose an entry, but not a batch in flight.
        self._in_flight: deque[dict[str, Submitted]] = deque()
        self._delivery = Delivery(device)
        inline = runs_inline(sources, device)
        self._sender: Executor = _Here() if inline else ThreadPoolExecutor(1, "dinov3-prefetch-send")
        self._receiver: Executor = (
            _Here() if inline else ThreadPoolExecutor(1, "dinov3-prefetch-receive", settle_thread, (_current_device(),))
        )

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, images: Images, route: Sequence[str] | None = None) -> None:
        """Send the images of a batch; returns at once. :meth:`take` raises its error.

        Args:
            route: the name of each image's teacher; None sends all images to all teachers.
        """
        # Images on an accelerator are read on the stream that made them, which is the stream of this thread.
        sender = _Here() if _on_accelerator(images) else self._sender
        self._entries.append(_Entry(sender.submit(self._submit, images, route)))
        self._deliver_ahead()

    def ready(self) -> bool:
        """Whether :meth:`take` would return at once."""
        delivered = self._entries[0].delivered
        return delivered is not None and delivered.done()

    def take(self) -> dict[str, Features]:
        """The targets of the oldest batch by teacher, each of the images that it was sent; waits for them.

        Raises:
            Exception: a teacher's error for this batch, unchanged.
        """
        delivered = self._entries[0].delivered
        assert delivered is not None
        wait(lambda seconds: bool(futures.wait([delivered], seconds).done))
        features = self._delivery.receive(delivered.result())
        self._entries.popleft()
        self._in_flight.popleft()
        self._deliver_ahead()
        return features

    def close(self) -> None:
        """Cancel all batches. When this returns, none of them is in flight."""
        self._sender.shutdown(wait=True, cancel_futures=True)
        submitted = [each for group in self._in_flight for each in group.values()]
        for each in submitted:
            each.cancel()
        self._receiver.shutdown(wait=True, cancel_futures=True)
        deadline = time.monotonic() + _CANCEL_SECONDS
        while not all(each.done() for each in submitted) and time.monotonic() < deadline:
            time.sleep(1e-3)
        self._entries.clear()
        self._in_flight.clear()

    def _submit(self, images: Images, route: Sequence[str] | None) -> dict[str, Submitted]:
        submitted: dict[str, Submitted] = {}
        self._in_flight.append(submitted)
        given = dict.fromkeys(self._sources, images) if route is None else split_images(images, route)
        for name, part in given.items():
            submitted[name] = self._sources[name].submit(part, self._specs[name])
        return submitted

    def _deliver_ahead(self) -> None:
        for entry in islice(self._entries, _DELIVERED_AHEAD):
            if entry.delivered is None:
                entry.delivered = self._receiver.submit(self._deliver, entry.sent)

    def _deliver(self, sent: Future[dict[str, Submitted]]) -> Delivered:
        return self._delivery.send({name: each.result() for name, each in sent.result().items()})


class _Here(Executor):
    """An executor that runs each function at once, in the caller's thread."""

    def submit(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - an executor keeps any error for the reader of the result
            future.set_exception(error)
        return future


def _current_device() -> torch.device | None:
    """The caller's, where a teacher of the user's would compute; None if it is the first, which every thread has."""
    index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
    return torch.device("cuda", index) if index else None


def _on_accelerator(images: Any) -> bool:
    first = images[0] if isinstance(images, (list, tuple)) and images else images
    return isinstance(first, Tensor) and first.device.type != "cpu"


def runs_inline(sources: Mapping[str, Submitter], device: torch.device | None) -> bool:
    """Whether all sources compute on the accelerator where their targets must be."""
    return all(isinstance(source, LocalSource) and source.shares(device) for source in sources.values())


class LocalSource:
    """A teacher of this process as a :class:`Submitter`: a batch is computed by the thread that waits for its result.

    Args:
        teacher: local, fake, stored, cached, or the user's own. It computes one batch at a time.
    """

    def __init__(self, teacher: Extractor) -> None:
        self.teacher = teacher
        self.lock = threading.Lock()
        self.watch = TeacherWatch()

    @property
    def parallelism(self) -> int:
        """One batch that is computed, and one that waits."""
        return 2

    def submit(self, images: Images, spec: FeatureSpec) -> LocalBatch:
        return LocalBatch(self, images, spec)

    def shares(self, device: torch.device | None) -> bool:
        """Whether the teacher computes on the accelerator where its targets must be (None: where it leaves them)."""
        own = getattr(self.teacher, "device", None)
        if own is None or torch.device(own).type == "cpu":
            return False
        return device is None or as_device(own) == device


class LocalBatch:
    """A batch that a teacher of this process will compute, or has computed."""

    def __init__(self, source: LocalSource, images: Images, spec: FeatureSpec) -> None:
        self._source, self._images, self._spec = source, images, spec
        self._done = False

    def result(self, timeout: float | None = None) -> Features:  # noqa: ARG002 - a computation cannot be interrupted
        """Compute it, in the caller's thread. Once only."""
        with self._source.lock:
            if self._done:
                raise PoolClosedError("this batch was cancelled, or its result was taken already")
            try:
                with torch.no_grad():  # grad mode is per thread, and on at first
                    features = self._source.teacher.extract(self._images, self._spec)
                    self._source.watch.results(features, self._images)
                    return features
            finally:
                self._done = True

    def done(self) -> bool:
        return self._done

    def cancel(self) -> None:
        """Cancel it if it has not begun; otherwise wait until it is computed."""
        with self._source.lock:
            self._done = True


def as_source(teacher: Submitter | Extractor) -> Submitter:
    """``teacher`` itself if it has ``submit``; otherwise a :class:`LocalSource` of it."""
    if callable(getattr(teacher, "submit", None)):
        return cast(Submitter, teacher)
    if callable(getattr(teacher, "extract", None)) and not isinstance(teacher, type):
        return LocalSource(cast(Extractor, teacher))
    raise ConfigError(
        "teacher must be a RemoteTeacher, an object with .extract(images, spec), or a dict of them by name; "
        f"got {teacher!r}"
    )


@dataclass(frozen=True, slots=True)
class Delivered:
    """Features by teacher. They are on the device, or on their way there as long as ``pending`` says."""

    features: Mapping[str, Features]
    pending: tuple[Pending, ...]


class Delivery:
    """Copies features to a device ahead of their use.

    To CUDA, the copy overlaps the student's kernels (see :class:`~dinov3_ray.model.upload.Upload`). The consumer's
    stream waits for the copy; the consumer's thread does not.

    :meth:`send` and :meth:`receive` may be called by different threads.

    Args:
        device: as :func:`~dinov3_ray.model.device.as_device` gives it; None leaves everything where it is.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._upload = Upload(device) if device is not None and device.type == "cuda" else None

    def send(self, features: Mapping[str, Features]) -> Delivered:
        """Begin the copy."""
        if self._upload is None:
            device = self._device
            moved = features if device is None else {name: each.to(device) for name, each in features.items()}
            return Delivered(moved, Pending.here(_tensors(moved)))  # a local teacher's outputs may be on a GPU
        pending = self._upload.begin(_tensors(features))
        copies = iter(pending.tensors)
        return Delivered({name: each.map(lambda *_: next(copies)) for name, each in features.items()}, (pending,))

    def receive(self, delivered: Delivered) -> dict[str, Features]:
        """The features, safe to use on the caller's current stream."""
        for pending in delivered.pending:
            pending.receive()
        return dict(delivered.features)


def _tensors(features: Mapping[str, Features]) -> list[Tensor]:
    return [tensor for each in features.values() for _, tensor in each.named()]
