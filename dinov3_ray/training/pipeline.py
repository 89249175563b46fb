"""Batches on their way through the teachers, in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import Images
from dinov3_ray.training.delivery import Delivered, Delivery
from dinov3_ray.training.sources import LocalSource, Submitted, Submitter
from dinov3_ray.waiting import wait

__all__ = ["Pipeline"]

Batch = TypeVar("Batch")
P = ParamSpec("P")
R = TypeVar("R")

_DELIVERED_AHEAD = 2  # batches whose targets are at the trainer's device before it asks: one in use, one in copy
_GIVE_UP_SECONDS = 5.0


@dataclass(slots=True)
class _Entry(Generic[Batch]):
    batch: Batch
    sent: Future[dict[str, Submitted]]
    delivered: Future[Delivered] | None = None


class Pipeline(Generic[Batch]):
    """First in, first out: batches go in with their images, and come out with their targets.

    Two threads keep the work off the trainer's: one hands batches to the teachers (which copies them), one takes the
    answers and moves them to the device, for the next two batches only, so that the device does not fill up. A teacher
    of this process computes in the second thread. Where all teachers compute on the very accelerator that the targets
    are for, there are no threads: that device can do one thing at a time, launching work there does not wait, and a
    second thread would only be in the way (of the GIL, of CUDA graphs).

    Args:
        sources: by name.
        specs: what to ask each for.
        device: where targets shall be.
    """

    def __init__(
        self, sources: Mapping[str, Submitter], specs: Mapping[str, FeatureSpec], device: torch.device | None
    ) -> None:
        self._sources, self._specs = sources, specs
        self._entries: deque[_Entry[Batch]] = deque()
        # What was sent, in the same order. Written where the sending is done, in a thread that no Ctrl-C interrupts: an
        # interrupt in put() may lose an entry, but nothing that is in flight.
        self._in_flight: deque[dict[str, Submitted]] = deque()
        self._delivery = Delivery(device)
        inline = runs_inline(sources, device)
        self._sender: Executor = _Here() if inline else ThreadPoolExecutor(1, "dinov3-prefetch-send")
        self._receiver: Executor = _Here() if inline else ThreadPoolExecutor(1, "dinov3-prefetch-receive")

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, batch: Batch, images: Images) -> None:
        """Send a batch; returns at once. An error shows when the batch is taken."""
        # Images on an accelerator are read on the stream that made them, which is this thread's.
        sender = _Here() if _on_accelerator(images) else self._sender
        self._entries.append(_Entry(batch, sender.submit(self._submit, images)))
        self._deliver_ahead()

    def ready(self) -> bool:
        """Whether :meth:`take` would return at once."""
        delivered = self._entries[0].delivered
        return delivered is not None and delivered.done()

    def take(self) -> tuple[Batch, dict[str, Features]]:
        """The batch that was put in first, with its targets; waits for them.

        Raises:
            Exception: what a teacher raised on this batch, as itself.
        """
        delivered = self._entries[0].delivered
        assert delivered is not None
        wait(lambda seconds: bool(futures.wait([delivered], seconds).done))
        features = self._delivery.receive(delivered.result())
        entry = self._entries.popleft()
        self._in_flight.popleft()
        self._deliver_ahead()
        return entry.batch, features

    def close(self) -> None:
        """Give up all that is in the pipeline. When this returns, nothing of it is in flight any more."""
        self._sender.shutdown(wait=True, cancel_futures=True)
        submitted = [each for group in self._in_flight for each in group.values()]
        for each in submitted:
            each.cancel()
        self._receiver.shutdown(wait=True, cancel_futures=True)
        deadline = time.monotonic() + _GIVE_UP_SECONDS
        while not all(each.done() for each in submitted) and time.monotonic() < deadline:
            time.sleep(1e-3)
        self._entries.clear()
        self._in_flight.clear()

    def _submit(self, images: Images) -> dict[str, Submitted]:
        submitted: dict[str, Submitted] = {}
        self._in_flight.append(submitted)
        for name, source in self._sources.items():
            submitted[name] = source.submit(images, self._specs[name])
        return submitted

    def _deliver_ahead(self) -> None:
        for entry in islice(self._entries, _DELIVERED_AHEAD):
            if entry.delivered is None:
                entry.delivered = self._receiver.submit(self._deliver, entry.sent)

    def _deliver(self, sent: Future[dict[str, Submitted]]) -> Delivered:
        return self._delivery.send({name: each.result() for name, each in sent.result().items()})


def runs_inline(sources: Mapping[str, Submitter], device: torch.device | None) -> bool:
    """Whether all sources compute on the accelerator where their targets shall be."""
    return all(isinstance(source, LocalSource) and source.shares(device) for source in sources.values())


class _Here(Executor):
    """Runs everything at once, in the caller's thread."""

    def submit(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - an executor keeps any error for who asks for the result
            future.set_exception(error)
        return future


def _on_accelerator(images: Any) -> bool:
    first = images[0] if isinstance(images, (list, tuple)) and images else images
    return isinstance(first, Tensor) and first.device.type != "cpu"
