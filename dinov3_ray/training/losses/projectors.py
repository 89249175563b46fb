"""Learned maps from a student's channels to its teacher's."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from dinov3_ray.errors import ConfigError

__all__ = ["ProjectorKind", "make_projector"]

ProjectorKind = Literal["linear", "mlp", "relu"]
"""What stands between the channels of the two.

- ``linear``: one layer, as in RT-DETRv4 (arXiv 2510.25257) and LightlyTrain.
- ``mlp``: two layers with LayerNorm and GELU between them, as in AM-RADIO (arXiv 2312.06709).
- ``relu``: two layers with ReLU between them, as in Ultralytics' ``distill_model``.
"""


def make_projector(
    teacher_channels: int,
    student_channels: int | None = None,
    *,
    vectors: bool = False,
    kind: ProjectorKind = "linear",
    hidden: int | None = None,
) -> nn.Module:
    """A learned map from the student's channels to the teacher's: of each location of a map, or of vectors.

    Args:
        teacher_channels: D, such as ``cfg.hidden_size``.
        student_channels: C; None makes a lazy module, which takes C from the first batch. Its parameters may go into an
            optimizer before that, and a state_dict may be loaded. DDP needs C, or a batch that was seen before.
        vectors: for [B, C] instead of [B, C, h, w].
        kind: how it maps them.
        hidden: channels between the two layers of ``mlp`` and ``relu``; None takes D.
    """
    for name, value in (
        ("teacher_channels", teacher_channels),
        ("student_channels", student_channels),
        ("hidden", hidden),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} must be an integer of at least 1; got {value!r}")
    if kind not in get_args(ProjectorKind):
        raise ConfigError(f"kind must be one of {', '.join(get_args(ProjectorKind))}; got {kind!r}")
    if kind == "linear":
        return _layer(teacher_channels, student_channels, vectors)
    width = hidden or teacher_channels
    if kind == "relu":
        first = _layer(width, student_channels, vectors)
        return nn.Sequential(first, nn.ReLU(), _layer(teacher_channels, width, vectors))
    first = _layer(width, student_channels, vectors=True)
    layers = nn.Sequential(first, nn.LayerNorm(width), nn.GELU(), nn.Linear(width, teacher_channels))
    return layers if vectors else _OfLocations(layers)


def _layer(to: int, channels: int | None, vectors: bool) -> nn.Module:
    if vectors:
        return nn.LazyLinear(to) if channels is None else nn.Linear(channels, to)
    return nn.LazyConv2d(to, 1) if channels is None else nn.Conv2d(channels, to, 1)


class _OfLocations(nn.Module):
    """Layers for vectors, applied to the channels of each location of a map [B, C, h, w]."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, map_BChw: Tensor) -> Tensor:
        projected: Tensor = self.layers(map_BChw.permute(0, 2, 3, 1))
        return projected.permute(0, 3, 1, 2)
