"""DINOv3's ViT, written for tests alone: official tensor names, float64, one operation after the other.

It shares nothing with the package or with transformers: attention is spelt out, and RoPE turns pairs of channels as
complex numbers. B images, N patches, D channels, H heads of size d.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def random_vit(
    *, width: int, heads: int, blocks: int, inner: int, swiglu: bool, registers: int, qkv_bias: bool, patch: int = 16
) -> Weights:
    """A random state dict in the official layout; LayerScale and biases, the masked key bias too, are far from 0."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int, scale: float = 0.1, shift: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + shift

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> Weights:
        weight = {f"{name}.weight": draw(rows, columns, scale=columns**-0.5)}
        return weight | ({f"{name}.bias": draw(rows)} if bias else {})

    def norm(name: str) -> Weights:
        return {f"{name}.weight": draw(width, shift=1.0), f"{name}.bias": draw(width)}

    quarter = width // heads // 4
    weights = {
        "cls_token": draw(1, 1, width, scale=0.5),
        "storage_tokens": draw(1, registers, width, scale=0.5),
        "mask_token": draw(1, width),
        "patch_embed.proj.weight": draw(width, 3, patch, patch, scale=(3 * patch * patch) ** -0.5),
        "patch_embed.proj.bias": draw(width),
        "rope_embed.periods": 100.0 ** (torch.arange(quarter) / quarter),
    }
    for block in range(blocks):
        name = f"blocks.{block}"
        weights |= norm(f"{name}.norm1") | norm(f"{name}.norm2")
        weights |= {f"{name}.ls{part}.gamma": draw(width, shift=0.4) for part in (1, 2)}
        weights |= linear(f"{name}.attn.qkv", 3 * width, width, qkv_bias) | linear(f"{name}.attn.proj", width, width)
        if qkv_bias:
            ones = torch.ones(width)
            weights[f"{name}.attn.qkv.bias_mask"] = torch.cat([ones, torch.zeros(width), ones])
        if swiglu:
            weights |= linear(f"{name}.mlp.w1", inner, width) | linear(f"{name}.mlp.w2", inner, width)
            weights |= linear(f"{name}.mlp.w3", width, inner)
        else:
            weights |= linear(f"{name}.mlp.fc1", inner, width) | linear(f"{name}.mlp.fc2", width, inner)
    return weights | norm("norm")


def forward_vit(weights: Weights, images_B3HW: Tensor, *, heads: int) -> Tensor:
    """All tokens after the final norm, float64 [B, 1+R+N, D]: CLS, registers, patches row by row."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    kernel = w["patch_embed.proj.weight"]
    map_BDhw = F.conv2d(images_B3HW.double(), kernel, w["patch_embed.proj.bias"], stride=kernel.shape[-1])
    patches_BND = map_BDhw.flatten(2).transpose(1, 2)
    batch, width = len(patches_BND), patches_BND.shape[-1]
    first_BRD = torch.cat([w["cls_token"], w["storage_tokens"]], 1).expand(batch, -1, -1)
    x = torch.cat([first_BRD, patches_BND], 1)
    turns_Nd = rope_turns(*map_BDhw.shape[-2:], width // heads)
    blocks = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for block in range(blocks):
        b = {name.split(".", 2)[2]: tensor for name, tensor in w.items() if name.startswith(f"blocks.{block}.")}
        x = x + b["ls1.gamma"] * attend(b, layer_norm(b, "norm1", x), heads, turns_Nd)
        x = x + b["ls2.gamma"] * feed_forward(b, layer_norm(b, "norm2", x))
    return layer_norm(w, "norm", x)


def layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def rope_turns(rows: int, columns: int, size: int) -> Tensor:
    """Unit complex numbers [N, d/2]: the first half of them turns by the row, the second by the column."""
    quarter = size // 4
    periods = 100.0 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    y = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows * 2 - 1
    x = (torch.arange(columns, dtype=torch.float64) + 0.5) / columns * 2 - 1
    by_row = (2 * math.pi * y[:, None, None] / periods).expand(rows, columns, quarter)
    by_column = (2 * math.pi * x[None, :, None] / periods).expand(rows, columns, quarter)
    angles = torch.cat([by_row, by_column], -1).reshape(rows * columns, size // 2)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(tokens_BHTd: Tensor, turns_Nd: Tensor) -> Tensor:
    """Turn the patch tokens; channel i is paired with i + d/2. The tokens before them stay."""
    prefix = tokens_BHTd.shape[2] - len(turns_Nd)
    real, imaginary = tokens_BHTd[:, :, prefix:].chunk(2, -1)
    turned = torch.complex(real.contiguous(), imaginary.contiguous()) * turns_Nd
    return torch.cat([tokens_BHTd[:, :, :prefix], torch.cat([turned.real, turned.imag], -1)], 2)


def attend(b: Weights, x: Tensor, heads: int, turns_Nd: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    qkv = x @ b["attn.qkv.weight"].T
    if "attn.qkv.bias" in b:
        qkv = qkv + b["attn.qkv.bias"] * b["attn.qkv.bias_mask"]
    q, k, v = qkv.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    scores = rotate(q, turns_Nd) @ rotate(k, turns_Nd).transpose(-1, -2) / math.sqrt(width // heads)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
    return mixed @ b["attn.proj.weight"].T + b["attn.proj.bias"]


def feed_forward(b: Weights, x: Tensor) -> Tensor:
    def linear(name: str, inputs: Tensor) -> Tensor:
        return inputs @ b[f"mlp.{name}.weight"].T + b[f"mlp.{name}.bias"]

    if "mlp.w1.weight" in b:
        gate = linear("w1", x)
        return linear("w3", gate / (1 + (-gate).exp()) * linear("w2", x))
    hidden = linear("fc1", x)
    return linear("fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
