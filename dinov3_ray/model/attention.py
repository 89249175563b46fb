"""The kernel that computes a teacher's attention, chosen for its device without torch's global flags.

``scaled_dot_product_attention`` chooses a kernel by flags of the whole process (``sdpa_kernel``,
``torch.backends.cuda``). They belong to the student: a teacher in another thread must not set them, nor change its bits
when they are set. So it calls one kernel by name: the first in order of preference that a trial shows to run there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dinov3_ray.model.device import TRIAL_TOKENS, trial_error

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


def choose_attention(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Let ``model``, a transformers ViT whose attention was left to transformers, compute it with the best kernel.

    On Hopper cuDNN's is 1.7 to 2.3 times as fast as the flash kernel that torch prefers (transformers pull request
    48163); it is slower on Ampere, so everywhere else torch's own order stands. Where no kernel runs, and on other
    devices, transformers' ``sdpa`` stays.
    """
    from transformers import AttentionInterface

    shape = (1, model.config.num_attention_heads, TRIAL_TOKENS)
    trial = torch.zeros(*shape, model.config.hidden_size // shape[1], device=device, dtype=dtype)
    # In the layout that a model gives: heads side by side in a token.
    heads = trial.transpose(1, 2).contiguous().transpose(1, 2)
    trials = {name: partial(_KERNELS[name], heads, heads, heads) for name in _preferred(device)}
    kernel = next((name for name, once in trials.items() if trial_error(once, device) is None), None)
    name = "sdpa" if kernel is None else f"sdpa-{kernel}"
    if kernel is not None:
        AttentionInterface.register(name, _as_transformers_call_it(_KERNELS[kernel]))
    model.config._attn_implementation = name


def _preferred(device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda":
        on_hopper = torch.cuda.get_device_capability(device)[0] == _HOPPER
        return ("cudnn", "flash", "efficient") if on_hopper else ("flash", "efficient")
    return ("cpu",) if device.type == "cpu" else ()


def _as_transformers_call_it(kernel: Callable[..., Any]) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: Any,  # noqa: ARG001 - the signature is transformers'
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **others: Any,  # noqa: ARG001 - dropout, which is 0 in eval mode
    ) -> tuple[Tensor, None]:
        assert attention_mask is None
        attended_BHND: Tensor = kernel(query, key, value, scale=scaling)[0]
        return attended_BHND.transpose(1, 2).contiguous(), None

    return attend
