"""The kernel that computes a teacher's attention, chosen for its device without torch's global flags.

``scaled_dot_product_attention`` chooses a kernel by flags of the whole process (``sdpa_kernel``,
``torch.backends.cuda``). They belong to the student: a teacher in another thread must not set them, nor change its bits
when they are set. So it calls one kernel by name: the first in order of preference that a trial shows to run there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["choose_attention"]

_Kernel = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
_HOPPER = 9  # major compute capability
_TRIAL_TOKENS = 41  # no multiple of what a kernel may want: images give any number of tokens
_aten = torch.ops.aten

# Each takes query, key and value [B, heads, N, channels] and the scale of their product.
_KERNELS: dict[str, _Kernel] = {
    "cudnn": lambda q, k, v, scale: _aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, scale=scale)[0],
    "flash": lambda q, k, v, scale: _aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0],
    "efficient": lambda q, k, v, scale: _aten._scaled_dot_product_efficient_attention(q, k, v, None, False, scale=scale)[
        0
    ],
    "cpu": lambda q, k, v, scale: _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)[0],
}


def choose_attention(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Let ``model``, a transformers ViT whose attention was left to transformers, compute it with the best kernel.

    On Hopper cuDNN's is 1.7 to 2.3 times as fast as the flash kernel that torch prefers (transformers pull request
    48163); it is slower on Ampere, so everywhere else torch's own order stands. Where no kernel runs, and on other
    devices, transformers' ``sdpa`` stays.
    """
    from transformers import AttentionInterface

    shape = (1, model.config.num_attention_heads, _TRIAL_TOKENS)
    trial = torch.zeros(*shape, model.config.hidden_size // shape[1], device=device, dtype=dtype)
    kernel = next((name for name in _preferred(device) if _runs(_KERNELS[name], trial)), None)
    name = "sdpa" if kernel is None else f"sdpa-{kernel}"
    if kernel is not None:
        AttentionInterface.register(name, _as_transformers_call_it(_KERNELS[kernel]))
    model.config._attn_implementation = name


def _preferred(device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda":
        on_hopper = torch.cuda.get_device_capability(device)[0] == _HOPPER
        return ("cudnn", "flash", "efficient") if on_hopper else ("flash", "efficient")
    return ("cpu",) if device.type == "cpu" else ()


def _runs(kernel: _Kernel, trial: Tensor) -> bool:
    try:
        # In the layout that a model gives: heads side by side in a token.
        heads = trial.transpose(1, 2).contiguous().transpose(1, 2)
        kernel(heads, heads, heads, None)
        if trial.device.type == "cuda":
            torch.cuda.synchronize(trial.device)
    except (RuntimeError, NotImplementedError):  # torch has no narrower error for a kernel that does not fit
        return False
    return True


def _as_transformers_call_it(kernel: _Kernel) -> Callable[..., tuple[Tensor, None]]:
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
        return kernel(query, key, value, scaling).transpose(1, 2).contiguous(), None

    return attend
