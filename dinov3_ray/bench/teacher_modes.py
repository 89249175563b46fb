"""The local teacher and its peer, each in several modes, each doing the same work.

The peer is transformers, driven as its documentation shows: the image processor, then ``AutoModel``. The processor
needs torchvision; where that is missing, its arithmetic runs in torch, as this package does it (the same bits).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3_ray.config import ComputeDtype, DinoV3Config
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import ImageBatch
from dinov3_ray.model import DinoV3Teacher
from dinov3_ray.model.preprocess import preprocess
from dinov3_ray.pool.replica.device_pipeline import pipeline_for

__all__ = ["SPEC", "Mode", "Task", "modes_for", "through_pipeline"]

SPEC = FeatureSpec(cls=True, feature_map=True)

Extract = Callable[[Tensor], Features]
"""Images, uint8 [B,3,H,W] in the host's memory, to their CLS tokens and maps on the device."""


@dataclass(frozen=True, slots=True)
class Task:
    """Batches of ``batch`` images, each of a fifth more pixels each way than the model's input, so that all resize."""

    config: DinoV3Config
    device: torch.device
    batch: int

    def images(self) -> Tensor:
        height, width = (side * 6 // 5 for side in self.config.image_size)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (self.batch, 3, height, width), dtype=torch.uint8, generator=generator)


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to do the task.

    Attributes:
        dtype: of its matrix products.
        ours: this package, not its peer.
        make: loads the model.
    """

    name: str
    dtype: torch.dtype
    ours: bool
    make: Callable[[Task], Extract]


def modes_for(device: torch.device, *, quick: bool) -> list[Mode]:
    """The modes to measure on ``device``; the first is the peer's default, to which all others are compared."""
    modes = [
        Mode("transformers float32 (its default)", torch.float32, False, lambda task: Peer(task, torch.float32)),
        Mode("transformers float32 eager", torch.float32, False, lambda task: Peer(task, torch.float32, "eager")),
        Mode("transformers bfloat16", torch.bfloat16, False, lambda task: Peer(task, torch.bfloat16)),
        Mode("float32", torch.float32, True, lambda task: ours(task, "float32")),
        Mode("bfloat16", torch.bfloat16, True, lambda task: ours(task, "bfloat16")),
    ]
    if not quick:
        modes.append(Mode("bfloat16 compiled", torch.bfloat16, True, lambda task: ours(task, "bfloat16", compile=True)))
    if device.type == "cuda" and not quick:
        for name, compile in (("bfloat16, CUDA graphs", False), ("bfloat16 compiled, CUDA graphs", True)):
            make = functools.partial(ours, dtype="bfloat16", compile=compile, cuda_graphs=True)
            modes.append(Mode(name, torch.bfloat16, True, make))
        compiled = Mode("float8 compiled", torch.float8_e4m3fn, True, lambda task: ours(task, "float8", compile=True))
        modes.append(compiled)
    return modes


def ours(task: Task, dtype: ComputeDtype, *, compile: bool = False, cuda_graphs: bool = False) -> Extract:
    root, size, attention = task.config.root, task.config.image_size, task.config.attention
    config = DinoV3Config(
        root, dtype=dtype, image_size=size, compile=compile, cuda_graphs=cuda_graphs, attention=attention
    )
    teacher = DinoV3Teacher(config, task.device)
    if cuda_graphs:
        teacher.warm_up(task.batch)  # which records them
    return lambda images: teacher.extract(images, SPEC)


class Peer:
    """transformers' own model and processor."""

    def __init__(self, task: Task, dtype: torch.dtype, attention: str | None = None) -> None:
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        options = {} if attention is None else {"attn_implementation": attention}
        self._task = task
        self._processor = _load_processor(task.config.root)
        self._model: Any = AutoModel.from_pretrained(task.config.root, dtype=dtype, **options).to(task.device).eval()

    def __call__(self, images: Tensor) -> Features:
        task = self._task
        if self._processor is None:
            pixels = preprocess(ImageBatch.of(images), task.config.preprocessing, task.device)
        else:
            height, width = task.config.image_size
            size = {"height": height, "width": width}
            inputs = self._processor(images=list(images), size=size, return_tensors="pt")
            pixels = inputs["pixel_values"].to(task.device)
        with torch.inference_mode():
            outputs = self._model(pixels)
        prefix = 1 + task.config.num_register_tokens
        map_BDhw = outputs.last_hidden_state[:, prefix:].transpose(1, 2).unflatten(2, task.config.grid_size)
        return Features(cls=outputs.pooler_output, feature_map=map_BDhw)


def _load_processor(root: Path) -> Any:
    """The processor; None without torchvision."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(root)
    except ImportError:
        return None


def through_pipeline(extract: Extract, task: Task, batches: int) -> Callable[[], None]:
    """``batches`` batches through a replica's pipeline: results in the host's memory, packed to be sent."""

    class Teacher:
        device = task.device

        def extract(self, images: Any, spec: FeatureSpec) -> Features:  # noqa: ARG002 - it is SPEC
            return extract(images)

    pipeline = pipeline_for(Teacher())
    batch = ImageBatch.of(task.images())

    def once() -> None:
        under_way = []
        for _ in range(batches):
            under_way.append(pipeline.begin(batch, len(batch), SPEC))
            if len(under_way) == pipeline.depth:
                under_way.pop(0).result()
        for one in under_way:
            one.result()

    return once
