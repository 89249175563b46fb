"""What a worker measures with, and how it says what it finds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from dinov3_ray.bench.own_ray import running
from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.config import DinoV3Config
from dinov3_ray.model.device import as_device

__all__ = ["GpuSetting", "PartSkippedError", "Reporter", "Sizes", "Workbench"]


class PartSkippedError(Exception):
    """A part cannot run here, and says why."""


@dataclass(frozen=True, slots=True)
class GpuSetting:
    """The options of the command, as they travel to the worker.

    Attributes:
        device: a torch device's name.
        quick: the smallest of everything, to see that it runs.
        folder: for files; the command removes it.
        address: of the Ray to join; None starts one.
    """

    device: str
    quick: bool
    folder: str
    address: str | None

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        large: the variant that all parts use.
        others: the other variants, the more usual ones first.
        pixels: sizes of the model's input, in the order in which they are measured; most parts use the first one.
        batch: images per batch; four times as many at less than half of the first size.
        repeats: runs that count, of which the median is taken.
        least: seconds per run at least.
        batches: that pass through a pool per run.
        images: that are extracted.
        files: distinct ones among them; the others are links to these.
        steps: of the training loops.
        student: (height and width of its images, their number per step, channels of its first stage).
        map_size: of extracted maps; None keeps them as they are.
    """

    large: str = "vitl16"
    others: tuple[str, ...] = ("vitb16", "vits16", "vith16plus")
    pixels: tuple[int, ...] = (512, 518, 224)
    batch: int = 32
    repeats: int = 3
    least: float = 0.3
    batches: int = 30
    images: int = 3072
    files: int = 256
    steps: int = 40
    student: tuple[int, int, int] = (640, 16, 64)
    map_size: tuple[int, int] | None = (16, 16)

    def batch_at(self, pixels: int) -> int:
        return self.batch * (4 if 2 * pixels < self.pixels[0] else 1)


_QUICK = Sizes("vit-test", ("vit-test-gated",), (32, 48), 2, 1, 0.0, 4, 16, 4, 3, (32, 2, 4), None)


@dataclass(slots=True)
class Workbench:
    """The device, the checkpoints and the Ray of one worker, each made when it is first needed."""

    setting: GpuSetting
    _open: ExitStack = field(default_factory=ExitStack)
    _has_ray: bool = False

    @property
    def sizes(self) -> Sizes:
        return _QUICK if self.setting.quick else Sizes()

    @property
    def device(self) -> torch.device:
        return as_device(self.setting.device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def checkpoint(self, variant: str) -> Path:
        """A checkpoint of random weights, drawn on the device."""
        root = Path(self.setting.folder) / variant
        return root if root.exists() else init_checkpoint(variant, root, device=self.device)

    def config(self) -> DinoV3Config:
        """What most parts run: the large variant at the first size, compiled on a GPU."""
        sizes = self.sizes
        root = self.checkpoint(sizes.large)
        return DinoV3Config(root, dtype="bfloat16", image_size=sizes.pixels[0], compile=self.on_gpu)

    def connect(self) -> None:
        """Connect to Ray, for as long as this worker lives."""
        if not self._has_ray:
            gpus = torch.cuda.device_count() if self.on_gpu else 0
            self._open.enter_context(running(self.setting.address, store_bytes=_STORE_BYTES, num_gpus=gpus))
            self._has_ray = True

    def close(self) -> None:
        """Leave Ray; end the one that was started here."""
        self._open.close()


_STORE_BYTES = 4 * 2**30  # maps of ViT-L at 512 px are 64 MiB per batch


@dataclass(slots=True)
class Reporter:
    """What a part says while it runs.

    Args:
        send: takes one message, a dict that JSON can hold.
        until: the time (:func:`time.monotonic`) from which nothing new is to be begun.
    """

    send: Callable[[dict[str, Any]], None]
    until: float

    def step(self, what: str) -> None:
        """Say what is being done, for whoever watches."""
        self.send({"kind": "step", "what": what})

    def row(self, row: dict[str, Any], detail: object = None) -> None:
        """Hand over a row of the part's table, and what does not fit it."""
        self.send({"kind": "row", "row": row, "detail": detail})

    @property
    def late(self) -> bool:
        """Whether the part's time is up."""
        return time.monotonic() >= self.until

    def leaves_out(self, what: str) -> bool:
        """Whether ``what`` must be left out, since the time is up; if so, it is noted."""
        if self.late:
            self.send({"kind": "left out", "what": what})
        return self.late
