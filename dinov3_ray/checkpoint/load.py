"""Loads checked weights into a transformers model.

The model is built from the configuration without memory (torch's meta device), and the checked tensors are put in
place one by one. ``from_pretrained`` is not used because it fills what is missing with random numbers, skips what is
unexpected, and needs a config.json that spells everything out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov3_ray.checkpoint.hf import model_options
from dinov3_ray.checkpoint.verify import read_tensors, require_finite, verify
from dinov3_ray.config import DinoV3Config
from dinov3_ray.config.architecture import Architecture, ConvNextArchitecture
from dinov3_ray.config.weights import canonical_name
from dinov3_ray.errors import CheckpointError, ConfigError

__all__ = ["build_model", "load_model"]


def load_model(
    config: DinoV3Config, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model of ``config`` on ``device``: a DINOv3ViTModel or DINOv3ConvNextModel in eval mode, without gradients.

    In float32 its outputs equal those of ``AutoModel.from_pretrained(config.root)`` bit for bit.

    Args:
        config: the model directory; ``config.attention`` is handed to transformers.
        device: of the model.
        dtype: of the weights. RoPE's frequencies stay float32 in any case.

    Raises:
        CheckpointError: the weights are missing, damaged, not finite, or not what the configuration says.
        ConfigError: transformers does not have, or this machine cannot run, ``config.attention``.
    """
    device = torch.device(device)
    weights = verify(config)
    model = build_model(config.architecture, config.attention)
    # transformers 5.5 renamed the blocks; both that name and the files' lead to the same canonical one.
    names = {canonical_name(name): name for name in model.state_dict()}
    if names.keys() != weights.tensors.keys():
        difference = sorted(names.keys() ^ weights.tensors.keys())
        raise CheckpointError(f"this transformers version expects other tensors than {config.root} has: {difference}")
    state: dict[str, Tensor] = {}
    for stored, tensor in read_tensors(weights):
        loaded = tensor.to(device=device, dtype=dtype)
        require_finite(stored, loaded)
        state[names[stored.name]] = loaded
    model.load_state_dict(state, strict=True, assign=True)
    _restore_buffers(model, device)
    return model.requires_grad_(False).eval()


def build_model(architecture: Architecture, attention: str = "auto") -> nn.Module:
    """The bare model on the meta device: shapes without memory. A ConvNeXt, which has none, ignores ``attention``.

    Raises:
        ConfigError: ``attention``, or the activation, is not to be had.
    """
    # Imported here, since it takes seconds, and half of what this package offers can do without.
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ViTConfig, DINOv3ViTModel
    from transformers.activations import ACT2FN

    if architecture.hidden_act not in ACT2FN:
        raise ConfigError(f"hidden_act must be one of transformers' activations; got {architecture.hidden_act!r}")
    if isinstance(architecture, ConvNextArchitecture):
        model_class, config = DINOv3ConvNextModel, DINOv3ConvNextConfig(**model_options(architecture))
    else:
        options = {} if attention == "auto" else {"attn_implementation": attention}
        model_class, config = DINOv3ViTModel, DINOv3ViTConfig(**model_options(architecture), **options)
    try:
        with torch.device("meta"):
            model: nn.Module = model_class(config)
    except (ValueError, ImportError) as error:
        if attention == "auto":
            raise
        raise ConfigError(f"attention {attention!r} cannot be used: {error}") from error
    return model


def _restore_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute what no file holds, RoPE's frequencies, which the meta device left without values.

    The modules that own them are made anew, by their own constructor and outside any default dtype, so that the
    values are those of the installed transformers version.
    """
    for name, module in list(model.named_children()):
        if any(buffer.is_meta for buffer in module.buffers()):
            with torch.device("cpu"):
                setattr(model, name, type(module)(model.config).to(device))
    still_meta = [name for name, tensor in model.named_buffers() if tensor.is_meta]
    assert not still_meta, f"buffers without values: {still_meta}"
