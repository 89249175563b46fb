"""DINOv3's ConvNeXt.

Shapes: B images, D channels (more in each stage), h × w cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov3_ray.config.architecture import ConvNextArchitecture
from dinov3_ray.network.activation import activation

__all__ = ["ConvNext"]


class ConvNext(nn.Module):
    """The whole network."""

    has_cls = True  # the normed global average
    num_register_tokens = 0
    num_prefix_tokens = 1

    def __init__(self, architecture: ConvNextArchitecture) -> None:
        super().__init__()
        widths = (3, *architecture.hidden_sizes[:-1])
        self.stages = nn.ModuleList([_Stage(architecture, stage, before) for stage, before in enumerate(widths)])
        self.layer_norm = nn.LayerNorm(architecture.hidden_size, eps=architecture.layer_norm_eps)
        self.pool = nn.AdaptiveAvgPool2d(1)

    @property
    def blocks(self) -> nn.ModuleList:
        """What ``FeatureSpec.layers`` counts: the stages; each takes a map [B,D,h,w], and gives the next."""
        return self.stages

    def begin(self, pixels_B3HW: Tensor) -> tuple[Tensor, None]:
        """The map before the first stage: the pixels themselves; a stage is given nothing else."""
        return pixels_B3HW.to(self.layer_norm.weight.dtype), None

    def step(self, stage: nn.Module, map_BDhw: Tensor, _: None) -> Tensor:
        """The map after ``stage``."""
        stepped_BDhw: Tensor = stage(map_BDhw)
        return stepped_BDhw

    def tokens(self, map_BDhw: Tensor) -> Tensor:
        """The last stage's map as [B, 1 + h × w, D] before the final norm: its mean, then its cells row by row."""
        return torch.cat([part.flatten(2).transpose(1, 2) for part in (self.pool(map_BDhw), map_BDhw)], dim=1)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """All tokens after the final norm, [B, 1 + h × w, D]."""
        map_BDhw = pixels_B3HW
        for stage in self.stages:
            map_BDhw = stage(map_BDhw)
        tokens_BND: Tensor = self.layer_norm(self.tokens(map_BDhw))
        return tokens_BND


class _Stage(nn.Module):
    """A step to fewer cells, and blocks. The first stage norms after its step, the others before."""

    def __init__(self, architecture: ConvNextArchitecture, stage: int, before: int) -> None:
        super().__init__()
        width, eps = architecture.hidden_sizes[stage], architecture.layer_norm_eps
        if stage == 0:
            step = [nn.Conv2d(before, width, kernel_size=4, stride=4), _ChannelNorm(width, eps=eps)]
        else:
            step = [_ChannelNorm(before, eps=eps), nn.Conv2d(before, width, kernel_size=2, stride=2)]
        self.downsample_layers = nn.ModuleList(step)
        self.layers = nn.ModuleList([_ConvBlock(architecture, width) for _ in range(architecture.depths[stage])])

    def forward(self, map_BDhw: Tensor) -> Tensor:
        for module in (*self.downsample_layers, *self.layers):
            map_BDhw = module(map_BDhw)
        return map_BDhw


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B,D,h,w]."""

    def forward(self, map_BDhw: Tensor) -> Tensor:
        return super().forward(map_BDhw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvBlock(nn.Module):
    def __init__(self, architecture: ConvNextArchitecture, width: int) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv2d(width, width, kernel_size=7, padding=3, groups=width)
        self.layer_norm = nn.LayerNorm(width, eps=architecture.layer_norm_eps)
        self.pointwise_conv1 = nn.Linear(width, 4 * width)
        self.pointwise_conv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.empty(width))
        self.act = activation(architecture.hidden_act)

    def forward(self, map_BDhw: Tensor) -> Tensor:
        normed_BhwD = self.layer_norm(self.depthwise_conv(map_BDhw).permute(0, 2, 3, 1))
        change_BhwD = self.pointwise_conv2(self.act(self.pointwise_conv1(normed_BhwD))) * self.gamma
        changed_BDhw: Tensor = map_BDhw + change_BhwD.permute(0, 3, 1, 2)
        return changed_BDhw
