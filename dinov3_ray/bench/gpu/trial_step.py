"""A real training step: without a teacher, with one in the loop, and with one in a pool on the same GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dinov3_ray.bench.gpu.setting import Reporter, Workbench
from dinov3_ray.bench.rates import free_memory, wait_for_device
from dinov3_ray.bench.training_steps import LoopPass, StepLoops
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.model import DinoV3Teacher
from dinov3_ray.pool.teacher_pool import TeacherPool
from dinov3_ray.training.losses import DistillationLoss

__all__ = ["TrialStudent", "measure_steps"]

_GPU_SHARE = 0.5  # of the GPU, for the replica
_WARM_UP = 3  # steps


class TrialStudent:
    """A convolutional student at stride 16 with its loss and its optimizer, in bfloat16 autocast.

    With 64 channels in its first stage, a forward pass at 640 px costs about 75 GFLOP, as a medium YOLO's does.
    """

    def __init__(self, device: torch.device, channels: int, teacher_channels: int) -> None:
        stages: list[nn.Module] = []
        before = 3
        for width in (channels, 2 * channels, 4 * channels, 8 * channels):
            stages += [_block(before, width, stride=2), _block(width, width), _block(width, width)]
            before = width
        self._device = device
        model: Any = nn.Sequential(*stages)  # its annotations do not have memory formats
        self._model = model.to(device, memory_format=torch.channels_last)
        projector = nn.Conv2d(before, teacher_channels, 1)
        self._distill = DistillationLoss("cosine", projector=projector).to(device)
        parameters = [*self._model.parameters(), *self._distill.parameters()]
        self._optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def __call__(self, images: Tensor, targets: Features | None, _share: float) -> None:
        """One whole step on uint8 images [B,3,H,W]."""
        pixels = images.to(self._device, non_blocking=True).to(memory_format=torch.channels_last) / 255
        with torch.autocast(self._device.type, dtype=torch.bfloat16):
            map_BChw = self._model(pixels)
            loss = map_BChw.float().square().mean()  # in place of a detector's
            if targets is not None:
                loss = loss + self._distill(map_BChw, targets)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()


def _block(before: int, after: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.SiLU())


def measure_steps(bench: Workbench, reporter: Reporter) -> None:
    """Milliseconds per step of each loop, and the memory that it takes."""
    sizes, device = bench.sizes, bench.device
    config = bench.config()
    side, rows, channels = sizes.student
    free_memory(device)
    images = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8)
    loops = StepLoops(
        lambda _: images.clone().pin_memory() if bench.on_gpu else images.clone(),
        TrialStudent(device, channels, config.hidden_size),
        finish=lambda: wait_for_device(device),
        spec=FeatureSpec(feature_map=True),
        device=device,
    )

    def measure(kind: str, what: str, base: float | None = None) -> float:
        reporter.step(what)
        if bench.on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        loops.run(kind, _WARM_UP)
        seen = loops.run(kind, sizes.steps)
        reporter.row(_row(what, seen, base, device))
        return seen.step

    free = measure("teacher-free", "no teacher")
    if not reporter.leaves_out("teacher in the loop"):
        loops.local = DinoV3Teacher(config, device)
        measure("in-loop teacher", "teacher in the loop", free)
        loops.local = None
        free_memory(device)
    if not reporter.leaves_out("teacher in a pool"):
        reporter.step("start of a pool")
        bench.connect()
        share = _GPU_SHARE if bench.on_gpu else 0
        with TeacherPool.start(config, name="bench-gpu-step", replicas=1, num_gpus=share, max_batch=rows) as pool:
            loops.remote = pool.teacher()
            measure("prefetch", f"teacher in a pool on the same device ({share:g} GPU)", free)


def _row(what: str, seen: LoopPass, base: float | None, device: torch.device) -> dict[str, Any]:
    """One row; the memory is that of this process at its peak, and that of all processes on the device."""
    row: dict[str, Any] = {"what": what, "ms per step": seen.step * 1e3, "ratio": seen.step / (base or seen.step)}
    row |= {"waiting": seen.wait_share, "fill, s": seen.fill}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        row["trainer's peak, GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
        row["in use on the GPU, GiB"] = (total - free) / 2**30
    return row
