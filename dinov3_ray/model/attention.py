"""What computes a teacher's attention, chosen for its device without torch's global flags.

``scaled_dot_product_attention`` chooses a kernel by flags of the whole process (``sdpa_kernel``,
``torch.backends.cuda``). They belong to the student: a teacher in another thread must not set them, nor change its bits
when they are set. So it calls one kernel by name: the first in order of preference that a trial shows to run there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_ray.checkpoint.hf import model_keys
from dinov3_ray.config.architecture import ViTArchitecture
from dinov3_ray.errors import ConfigError
from dinov3_ray.model.device import TRIAL_TOKENS, trial_error
from dinov3_ray.network.vit import Attend, ViT

__all__ = ["choose_attention"]

_HOPPER = 9  # major compute capability
_aten = torch.ops.aten

# Each takes query, key and value [B, heads, N, channels]; the first of its results is theirs.
_KERNELS: dict[str, Callable[..., Any]] = {
    "cudnn": partial(_aten._scaled_dot_product_cudnn_attention, attn_bias=None, compute_log_sumexp=False),
    "flash": _aten._scaled_dot_product_flash_attention,
    "efficient": partial(_aten._scaled_dot_product_efficient_attention, attn_bias=None, compute_log_sumexp=False),
    "cpu": _aten._scaled_dot_product_flash_attention_for_cpu,
}


def choose_attention(model: ViT, wanted: str, device: torch.device, dtype: torch.dtype) -> None:
    """Let ``model`` compute its attention as a DinoV3Config's ``attention`` says.

    ``auto`` is the best kernel. On Hopper cuDNN's is 1.7 to 2.3 times as fast as the flash kernel that torch prefers
    (transformers pull request 48163); it is slower on Ampere, so everywhere else torch's own order stands. Where no
    kernel runs, and on other devices, it is ``sdpa``. Names other than ``sdpa`` and ``eager`` are transformers'.

    Raises:
        ConfigError: transformers does not have, or this machine cannot run, what is ``wanted``.
    """
    kernel = _best_kernel(model.architecture, device, dtype) if wanted == "auto" else None
    if kernel is not None:
        model.use_attention(f"sdpa-{kernel}", _by_kernel(_KERNELS[kernel]))
    elif wanted in ("auto", "sdpa"):
        model.use_attention("sdpa", F.scaled_dot_product_attention)
    elif wanted == "eager":
        model.use_attention("eager", _eager)
    else:
        model.use_attention(wanted, _of_transformers(wanted, model.architecture))


def _best_kernel(architecture: ViTArchitecture, device: torch.device, dtype: torch.dtype) -> str | None:
    """The name of the first kernel that runs on ``device``; None if none does."""
    shape = (1, architecture.num_heads, TRIAL_TOKENS)
    trial = torch.zeros(*shape, architecture.hidden_size // shape[1], device=device, dtype=dtype)
    # In the layouts that a model gives: RoPE writes query and key head by head; a token has its values side by side.
    value = trial.transpose(1, 2).contiguous().transpose(1, 2)
    trials = {name: partial(_KERNELS[name], trial, trial, value) for name in _preferred(device, dtype)}
    return next((name for name, once in trials.items() if trial_error(once, device) is None), None)


def _preferred(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    if device.type == "cuda":
        # Called by name, cuDNN's takes any other dtype for float16, without an error: scaled_dot_product_attention,
        # which looks at the dtype, is not in between (torch's aten/src/ATen/native/cudnn/MHA.cpp).
        if dtype not in (torch.bfloat16, torch.float16):
            return ("efficient",)
        on_hopper = torch.cuda.get_device_capability(device)[0] == _HOPPER
        return ("cudnn", "flash", "efficient") if on_hopper else ("flash", "efficient")
    return ("cpu",) if device.type == "cpu" else ()


def _by_kernel(kernel: Callable[..., Any]) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        attended_BHNC: Tensor = kernel(query, key, value, scale=scale)[0]
        return attended_BHNC

    return attend


def _eager(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """One operation after the other."""
    scores_BHNN = query @ key.transpose(-2, -1) * scale
    return scores_BHNN.softmax(dim=-1) @ value


def _of_transformers(name: str, architecture: ViTArchitecture) -> Attend:
    """The attention that transformers registers under ``name``, such as ``flash_attention_2``."""
    from transformers import AttentionInterface, DINOv3ViTConfig, DINOv3ViTModel  # here, since it takes seconds

    options = model_keys(replace(architecture, num_layers=1))
    try:
        # Its own model finds out whether it can be used here, and may fetch it, under another name, from the hub.
        with torch.device("meta"):
            model = DINOv3ViTModel(DINOv3ViTConfig(**options, attn_implementation=name)).eval()
    except (ValueError, ImportError) as error:
        raise ConfigError(f"attention {name!r} cannot be used: {error}") from error
    # These functions read settings from the module that calls them.
    caller = next(module for module in model.modules() if hasattr(module, "is_causal"))
    function = AttentionInterface()[caller.config._attn_implementation]

    def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        attended_BNHC: Tensor = function(caller, query, key, value, None, dropout=0.0, scaling=scale)[0]
        return attended_BNHC.transpose(1, 2)

    return attend
