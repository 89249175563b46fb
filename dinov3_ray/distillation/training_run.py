"""A training as steps that can be left after any of them: its state, saved and loaded, gives the same bits again."""

from __future__ import annotations

import logging
import math
import random
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dinov3_ray.errors import ConfigError, NumericsError
from dinov3_ray.features import Features
from dinov3_ray.training.distiller import Distiller

__all__ = ["Amp", "Schedule", "TrainingRun", "choose_amp"]

log = logging.getLogger("dinov3_ray")

Amp = Literal["auto", "off", "bfloat16", "float16"]
"""The dtype of autocast; ``auto`` is bfloat16 on a GPU that multiplies it, float16 on others, and off elsewhere."""

_LONGEST_GRADIENT = 3.0  # as in DINO's and DINOv2's recipes


def choose_amp(amp: Amp, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on ``device``, or None for none."""
    if amp not in get_args(Amp):
        raise ConfigError(f"amp must be one of {', '.join(get_args(Amp))}; got {amp!r}")
    if amp == "auto":
        if device.type != "cuda":
            return None
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if amp == "float16" and device.type != "cuda":
        raise ConfigError(f"amp must be another than 'float16' on {device.type}, where it is of no use; 'bfloat16' is")
    return {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[amp]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate: a linear rise, then a cosine down to 0 after the last step.

    Args:
        peak: the highest rate.
        steps: in all.
        warmup: steps of the rise.
    """

    peak: float
    steps: int
    warmup: int

    def rate(self, step: int) -> float:
        """Of ``step``, from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


class TrainingRun:
    """Trains a student, with all that its next step depends on.

    Args:
        student: takes images [B,3,H,W].
        distiller: the loss, with its tap attached; its parameters are trained too.
        schedule: of the learning rate.
        weight_decay: AdamW's, on matrices and kernels; biases and norms have none.
        device: of both modules.
        amp: the dtype of autocast.

    Attributes:
        step: steps done.
    """

    def __init__(
        self,
        student: nn.Module,
        distiller: Distiller,
        schedule: Schedule,
        *,
        weight_decay: float,
        device: torch.device,
        amp: torch.dtype | None,
    ) -> None:
        self.student, self.distiller, self.schedule = student, distiller, schedule
        self.device, self._amp = device, amp
        self.step = 0
        parameters = [each for each in (*student.parameters(), *distiller.parameters()) if each.requires_grad]
        self._parameters = parameters
        groups = [
            {"params": [each for each in parameters if each.ndim > 1], "weight_decay": weight_decay},
            {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=schedule.peak)
        self._scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self._loss_sum = torch.zeros((), device=device)
        self._losses = 0

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return self.schedule.rate(max(0, self.step - 1))

    def do_step(self, images_B3HW: Tensor, targets: Features) -> None:
        """One step of the optimizer."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        self.student.train()
        self.distiller.train()
        with torch.autocast(self.device.type, self._amp or torch.bfloat16, enabled=self._amp is not None):
            self.student(images_B3HW.to(self.device, non_blocking=True))
            loss: Tensor = self.distiller(targets)  # of what its tap took
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.unscale_(self._optimizer)
        nn.utils.clip_grad_norm_(self._parameters, _LONGEST_GRADIENT)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._loss_sum += loss.detach()
        self._losses += 1
        self.step += 1

    def mean_loss(self) -> float:
        """Of the steps since the last :meth:`forget_losses`; waits for the device.

        Raises:
            NumericsError: it is not finite.
        """
        mean = self._loss_sum.item() / max(1, self._losses)
        if not math.isfinite(mean):
            raise NumericsError(
                f"the loss must be finite; it is {mean} by step {self.step} (try a lower --lr, or --amp off, with "
                "another OUT: this one keeps its settings). The last checkpoint is from before"
            )
        return mean

    def forget_losses(self) -> None:
        self._loss_sum.zero_()
        self._losses = 0

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, but for the images and the teacher; torch.load reads it as weights only.

        Raises:
            NumericsError: a loss was not finite: what is saved could not be trained on.
        """
        self.mean_loss()
        kind, words, *rest = np.random.get_state(legacy=True)
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "step": self.step,
            "student": self.student.state_dict(),
            "distiller": self.distiller.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "loss": (self._loss_sum.cpu(), self._losses),
            "random": {
                "torch": torch.get_rng_state(),
                "cuda": cuda,
                "python": random.getstate(),
                "numpy": (kind, np.asarray(words).tolist(), *rest),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``: of the same student, distiller and settings."""
        self.student.load_state_dict(state["student"])
        self.distiller.load_state_dict(state["distiller"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        loss, self._losses = state["loss"]
        self._loss_sum.copy_(loss)
        self.step = state["step"]
        chance = state["random"]
        torch.set_rng_state(chance["torch"])
        if chance["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(chance["cuda"], self.device)
        version, words, gauss = chance["python"]
        random.setstate((version, tuple(words), gauss))
        kind, numbers, *rest = chance["numpy"]
        np.random.set_state((kind, np.array(numbers, np.uint32), *rest))
