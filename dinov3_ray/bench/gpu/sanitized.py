"""A replica's pipeline under torch's CUDA sanitizer, in a process of its own: python -m dinov3_ray.bench.gpu.sanitized.

TORCH_CUDA_SANITIZER must be set before torch is imported. A race between streams raises an error. To show that it
would, a race is planted at the end.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch.cuda._sanitizer import CUDASanitizerErrors

from dinov3_ray.config import DinoV3Config
from dinov3_ray.errors import DinoV3Error
from dinov3_ray.features import FeatureSpec
from dinov3_ray.images import ImageBatch
from dinov3_ray.model import DinoV3Teacher
from dinov3_ray.pool.replica.device_pipeline import DevicePass, pipeline_for

__all__ = ["SWITCH", "drive", "finds_a_race"]

SWITCH = "TORCH_CUDA_SANITIZER"

_SPECS = (
    FeatureSpec(cls=True, feature_map=True),
    FeatureSpec(cls=True, feature_map=True, registers=True, layers=(0,), map_size=(7, 9), dtype="int8"),
)


def drive(root: str, device: str, batches: int) -> int:
    """Take stacked and ragged batches through the pipeline, several in flight; returns their number."""
    pipeline = pipeline_for(DinoV3Teacher(DinoV3Config(root, dtype="bfloat16", compile=False), device))
    in_flight: list[DevicePass] = []
    driven = 0
    for spec in _SPECS:
        for number in range(batches):
            images = torch.full((4, 3, 300, 400), number, dtype=torch.uint8)
            batch = ImageBatch.of(images if number % 3 else [images[0], images[1, :, :100]])
            in_flight.append(pipeline.begin(batch, len(batch), spec))
            driven += 1
            if len(in_flight) == pipeline.depth:
                in_flight.pop(0).result()
    for one in in_flight:
        one.result()
    return driven


def finds_a_race(device: torch.device) -> bool:
    """Whether the sanitizer finds two streams that write the same memory without waiting for each other."""
    written = torch.zeros(16, device=device)
    stream: Any = torch.cuda.Stream  # its annotations are partial
    try:
        with torch.cuda.stream(stream(device)):
            written.add_(1)
    except CUDASanitizerErrors:
        return True
    return False


def _main(root: str, device: str, batches: str) -> None:
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and SWITCH not in os.environ:
        raise DinoV3Error(f"{SWITCH} must be set before torch is imported")
    driven = drive(root, device, int(batches))
    found = finds_a_race(torch.device(device)) if on_gpu else None
    print(json.dumps({"batches": driven, "finds a planted race": found}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
