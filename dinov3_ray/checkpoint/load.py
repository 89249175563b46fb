"""Loads checked weights into a network.

A DINOv3 is built from the configuration without memory (torch's meta device), and the checked tensors are put in
place one by one. transformers' ``from_pretrained`` is not used because it fills what is missing with random numbers,
skips what is unexpected, and needs a config.json that spells everything out. For other models it is used, with a check
of both (:mod:`dinov3_ray.checkpoint.transformers_weights`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from dinov3_ray.checkpoint.tensors import read_tensor, read_tensors, require_finite
from dinov3_ray.checkpoint.transformers_weights import load_transformers
from dinov3_ray.checkpoint.verify import verify
from dinov3_ray.config import ModelConfig, TransformersConfig
from dinov3_ray.config.architecture import Architecture, ConvNextArchitecture
from dinov3_ray.config.weights import StoredTensor
from dinov3_ray.network.convnext import ConvNext
from dinov3_ray.network.transformers_network import TransformersNetwork
from dinov3_ray.network.vit import ViT

__all__ = ["build_model", "load_model", "load_reference"]


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
        require_finite(stored.file, stored.key, loaded)
        state[stored.name] = loaded
    model.load_state_dict(state, strict=True, assign=True)
    _move_buffers(model, device)
    return model.requires_grad_(False).eval()


def load_reference(
    config: ModelConfig, device: torch.device
) -> tuple[ViT | ConvNext | TransformersNetwork, torch.device]:
    """The network of ``config`` in float32, beside another copy of it on ``device``, and where it computes.

    A DINOv3 computes on ``device``, which never holds more of it than one block: each part reads its weights when it
    is called, and drops them when it is done. Other models compute on the CPU.

    Raises:
        CheckpointError, ConfigError: as :func:`load_model`.
    """
    if isinstance(config, TransformersConfig):
        cpu = torch.device("cpu")
        return load_model(config, cpu), cpu
    weights = verify(config)
    model = build_model(cast(Architecture, config.architecture))
    for name, part in _parts(model):
        stored = {inner: weights.tensors[f"{name}.{inner}"] for inner, _ in part.named_parameters()}
        part.register_forward_pre_hook(partial(_fill, stored=stored, device=device))
        part.register_forward_hook(_empty)
    _move_buffers(model, device)
    return model.requires_grad_(False).eval(), device


def _parts(model: ViT | ConvNext) -> Iterator[tuple[str, nn.Module]]:
    """The blocks, and what comes before and after them, by name."""
    for name, child in model.named_children():
        if child is model.blocks:
            yield from ((f"{name}.{index}", block) for index, block in child.named_children())
        else:
            yield name, child


def _fill(part: nn.Module, _given: object, *, stored: Mapping[str, StoredTensor], device: torch.device) -> None:
    state = {name: read_tensor(tensor).to(device=device, dtype=torch.float32) for name, tensor in stored.items()}
    part.load_state_dict(state, assign=True)


def _empty(part: nn.Module, _given: object, _result: object) -> None:
    part.load_state_dict({name: tensor.to("meta") for name, tensor in part.named_parameters()}, assign=True)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move what no file holds, such as RoPE's frequencies."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def build_model(architecture: Architecture) -> ViT | ConvNext:
    """The bare network on the meta device: shapes without memory.

    Raises:
        ConfigError: the activation is unknown.
    """
    with torch.device("meta"):
        return ConvNext(architecture) if isinstance(architecture, ConvNextArchitecture) else ViT(architecture)
