"""DINOv3's ConvNeXt, written for tests alone: official tensor names, float64, one operation after the other."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def random_convnext(widths: tuple[int, ...], depths: tuple[int, ...]) -> Weights:
    """A random state dict in the official layout; LayerScale and biases are far from 0."""
    generator = torch.Generator().manual_seed(9)

    def draw(*shape: int, scale: float = 0.1, shift: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + shift

    def layer(name: str, *shape: int) -> Weights:
        return {f"{name}.weight": draw(*shape, scale=math.prod(shape[1:]) ** -0.5), f"{name}.bias": draw(shape[0])}

    def norm(name: str, width: int) -> Weights:
        return {f"{name}.weight": draw(width, shift=1.0), f"{name}.bias": draw(width)}

    weights = layer("downsample_layers.0.0", widths[0], 3, 4, 4) | norm("downsample_layers.0.1", widths[0])
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage:
            before = widths[stage - 1]
            weights |= norm(f"downsample_layers.{stage}.0", before)
            weights |= layer(f"downsample_layers.{stage}.1", width, before, 2, 2)
        for block in range(depth):
            name = f"stages.{stage}.{block}"
            weights |= {f"{name}.gamma": draw(width, shift=0.4)}
            weights |= layer(f"{name}.dwconv", width, 1, 7, 7) | norm(f"{name}.norm", width)
            weights |= layer(f"{name}.pwconv1", 4 * width, width) | layer(f"{name}.pwconv2", width, 4 * width)
    final = norm("norm", widths[-1])
    return weights | final | {f"norms.3.{name.split('.')[1]}": tensor for name, tensor in final.items()}


def forward_convnext(weights: Weights, images_B3HW: Tensor) -> Tensor:
    """The global average and the cells row by row, after the final norm: float64 [B, 1+N, D]."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = F.conv2d(images_B3HW.double(), *pair(w, "downsample_layers.0.0"), stride=4)
    x = norm_channels(w, "downsample_layers.0.1", x)
    stages = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("stages."))
    for stage in range(stages):
        if stage:
            x = norm_channels(w, f"downsample_layers.{stage}.0", x)
            x = F.conv2d(x, *pair(w, f"downsample_layers.{stage}.1"), stride=2)
        depth = 1 + max(int(name.split(".")[2]) for name in w if name.startswith(f"stages.{stage}."))
        for block in range(depth):
            x = x + one_block(w, f"stages.{stage}.{block}", x)
    cells_BND = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([cells_BND.mean(1, keepdim=True), cells_BND], 1)
    return norm_last(w, "norm", tokens)


def one_block(w: Weights, name: str, x: Tensor) -> Tensor:
    y = F.conv2d(x, *pair(w, f"{name}.dwconv"), padding=3, groups=x.shape[1])
    y = norm_last(w, f"{name}.norm", y.permute(0, 2, 3, 1))
    weight, bias = pair(w, f"{name}.pwconv1")
    y = y @ weight.T + bias
    y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    weight, bias = pair(w, f"{name}.pwconv2")
    return ((y @ weight.T + bias) * w[f"{name}.gamma"]).permute(0, 3, 1, 2)


def pair(w: Weights, name: str) -> tuple[Tensor, Tensor]:
    return w[f"{name}.weight"], w[f"{name}.bias"]


def norm_last(w: Weights, name: str, x: Tensor) -> Tensor:
    weight, bias = pair(w, name)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * weight + bias


def norm_channels(w: Weights, name: str, x: Tensor) -> Tensor:
    return norm_last(w, name, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
