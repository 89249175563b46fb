"""Learned maps from a student's channels to its teacher's."""

from __future__ import annotations

from torch import nn

from dinov3_ray.errors import ConfigError

__all__ = ["make_projector"]


def make_projector(teacher_channels: int, student_channels: int | None = None, *, vectors: bool = False) -> nn.Module:
    """A learned linear map from the student's channels to the teacher's: a 1 × 1 convolution, or a Linear for vectors.

    Args:
        teacher_channels: D, such as ``cfg.hidden_size``.
        student_channels: C; None makes a lazy module, which takes C from the first batch. Its parameters may go into an
            optimizer before that, and a state_dict may be loaded. DDP needs C, or a batch that was seen before.
        vectors: for [B, C] instead of [B, C, h, w].
    """
    for name, value in (("teacher_channels", teacher_channels), ("student_channels", student_channels)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} must be an integer of at least 1; got {value!r}")
    if vectors:
        return (
            nn.LazyLinear(teacher_channels)
            if student_channels is None
            else nn.Linear(student_channels, teacher_channels)
        )
    if student_channels is None:
        return nn.LazyConv2d(teacher_channels, 1)
    return nn.Conv2d(student_channels, teacher_channels, 1)
