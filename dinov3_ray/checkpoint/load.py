"""Loads checked weights into a network.

A DINOv3 is built from the configuration without memory (torch's meta device), and the checked tensors are put in
place one by one. transformers' ``from_pretrained`` is not used because it fills what is missing with random numbers,
skips what is unexpected, and needs a config.json that spells everything out. For other models it is used, with a check
of both (:mod:`dinov3_ray.checkpoint.transformers_weights`).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dinov3_ray.checkpoint.transformers_weights import load_transformers
from dinov3_ray.checkpoint.verify import read_tensors, require_finite, verify
from dinov3_ray.config import ModelConfig, TransformersConfig
from dinov3_ray.config.architecture import Architecture, ConvNextArchitecture
from dinov3_ray.network.convnext import ConvNext
from dinov3_ray.network.transformers_network import TransformersNetwork
from dinov3_ray.network.vit import ViT

__all__ = ["build_model", "load_model"]


def load_model(
    config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ViT | ConvNext | TransformersNetwork:
    """The network of ``config`` on ``device``, in eval mode, without gradients.

    In float32 its outputs equal those of transformers' ``AutoModel.from_pretrained(config.root)`` bit for bit.

    Args:
        config: the model directory.
        device: of the model.
        dtype: of the weights. RoPE's frequencies stay float32 in any case.

    Raises:
        CheckpointError: the weights are missing, damaged, not finite, or not what the configuration says.
        ConfigError: the activation is unknown, or the model is none whose tokens are patches.
    """
    device = torch.device(device)
    if isinstance(config, TransformersConfig):
        return load_transformers(config, device, dtype)
    weights = verify(config)
    model = build_model(cast(Architecture, config.architecture))
    state: dict[str, Tensor] = {}
    for stored, tensor in read_tensors(weights):
        loaded = tensor.to(device=device, dtype=dtype)
        require_finite(stored, loaded)
        state[stored.name] = loaded
    model.load_state_dict(state, strict=True, assign=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):  # RoPE's frequencies, which no file holds
            setattr(module, name, buffer.to(device))
    return model.requires_grad_(False).eval()


def build_model(architecture: Architecture) -> ViT | ConvNext:
    """The bare network on the meta device: shapes without memory.

    Raises:
        ConfigError: the activation is unknown.
    """
    with torch.device("meta"):
        return ConvNext(architecture) if isinstance(architecture, ConvNextArchitecture) else ViT(architecture)
