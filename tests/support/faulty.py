"""Teachers that misbehave on cue, for the fault tests: a mark in an image's first pixel says what to do.

Real processes really die here: a mark of KILL ends the replica's process as the kernel's OOM killer would, and one of
LOSE has torch say that the device is lost.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor

from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import ImageBatch, Images
from dinov3_ray.testing import FakeTeacher

#: What torch raises where CUDA reports an error: a class of its own from 2.8 on.
CudaError: type[RuntimeError] = getattr(torch, "AcceleratorError", RuntimeError)

OK, KILL, RAISE, NAN_ONCE, NAN_ALWAYS, HANG_ONCE, KILL_ONCE, LOSE, LOSE_ONCE = range(9)

#: Hang without letting go of Python's lock, as C code may, so that no thread of the process answers.
FREEZE_ONCE = 100


def batch_of(number: int, mark: int = OK, rows: int = 2) -> Tensor:
    """A batch, uint8 [rows,3,32,48], that says its number in every pixel but the mark."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (rows, 3, 32, 48), dtype=torch.uint8, generator=generator)
    images[:, 0, 0, 0] = mark
    return images


class FaultyTeacher(FakeTeacher):
    """A FakeTeacher that obeys marks. ``folder`` remembers, across processes, what was done once already."""

    def __init__(self, folder: Path, **arguments: object) -> None:
        super().__init__(**arguments)  # type: ignore[arg-type]
        self._folder = folder

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        batch = ImageBatch.of(images)
        marks = {int(image[0, 0, 0]) for image in batch}
        if KILL in marks or (KILL_ONCE in marks and self._first("kill")):
            os.kill(os.getpid(), signal.SIGKILL)
        if LOSE in marks or (LOSE_ONCE in marks and self._first("lose")):
            raise CudaError("CUDA error: an illegal memory access was encountered")
        if RAISE in marks:
            raise LookupError("scripted: this batch cannot be computed")
        if HANG_ONCE in marks and self._first("hang"):
            time.sleep(3600)
        if FREEZE_ONCE in marks and self._first("freeze"):
            ctypes.PyDLL(None).sleep(3600)
        features = super().extract(batch, spec)
        if NAN_ALWAYS in marks or (NAN_ONCE in marks and self._first("nan")):
            return features.map(lambda _, tensor: tensor.clone().fill_(float("nan")))
        return features

    def _first(self, what: str) -> bool:
        try:
            (self._folder / what).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class UnluckyTeacher(FaultyTeacher):
    """The first process that builds it ends itself; the second loses its device."""

    def __init__(self, folder: Path, **arguments: object) -> None:
        super().__init__(folder, **arguments)
        if self._first("ends"):
            os._exit(1)
        if self._first("loses"):
            raise CudaError("CUDA error: an illegal memory access was encountered")


class HopelessTeacher(FakeTeacher):
    """Cannot be built."""

    def __init__(self) -> None:
        raise OSError("no weights here")
