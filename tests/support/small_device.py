"""A device with room for so many images only: beyond, it raises torch's own error as a pass begins, or as it ends."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import ImageBatch, Images
from dinov3_ray.pool.replica.device_pipeline import DevicePass, Results, SynchronousPipeline
from dinov3_ray.testing import FakeTeacher

PIXELS = 32 * 48  # of an image that takes one place: those of sample_images


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 79 GiB")


class SmallDevice:
    """A device pipeline. What is in flight takes room too.

    Attributes:
        tried: images of each pass that was begun.
        alive: passes that somebody still held, with what they hold on the device, when each was begun.
    """

    depth = 3

    def __init__(self, room: float, *, late: bool = False) -> None:
        self.room = room
        self.tried: list[int] = []
        self.alive: list[int] = []
        self._late = late
        self._passes: weakref.WeakSet[_SmallPass] = weakref.WeakSet()
        self._real = SynchronousPipeline(FakeTeacher())
        self._taken = 0.0
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._open.set()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within it, no pass ends."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def begin(self, batch: ImageBatch, rows: int, spec: FeatureSpec) -> DevicePass:
        needs = sum(image.shape[-2] * image.shape[-1] for image in batch) / PIXELS
        with self._lock:
            self.tried.append(len(batch))
            self.alive.append(len(self._passes))
            fits = self._taken + needs <= self.room
            if not fits and not self._late:
                raise out_of_memory()
            self._taken += needs
        begun = _SmallPass(self, self._real.begin(batch, rows, spec), needs, fits)
        self._passes.add(begun)
        return begun

    def end(self, needs: float) -> None:
        assert self._open.wait(30)
        with self._lock:
            self._taken -= needs


@dataclass(eq=False)
class _SmallPass:
    device: SmallDevice
    real: DevicePass
    needs: float
    fits: bool

    def result(self) -> Results:
        self.device.end(self.needs)
        if not self.fits:
            raise out_of_memory()
        return self.real.result()


class SmallTeacher(FakeTeacher):
    """A teacher of ``room`` images at once.

    Attributes:
        tried: images of each pass.
    """

    def __init__(self, room: float, **arguments: object) -> None:
        super().__init__(**arguments)  # type: ignore[arg-type]
        self.room = room
        self.tried: list[int] = []

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        batch = ImageBatch.of(images)
        self.tried.append(len(batch))
        if sum(image.shape[-2] * image.shape[-1] for image in batch) > self.room * PIXELS:
            raise out_of_memory()
        return super().extract(batch, spec)
