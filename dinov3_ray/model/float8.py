"""Linear layers that multiply in float8: half of bfloat16's bytes, and twice its rate on GPUs that have it.

Weights are quantised once, with a scale per output channel; inputs in each pass, with a scale per token. Everything
outside the matrix products stays bfloat16. float8 is less exact than bfloat16, so ``auto`` never chooses it, and the
golden check (:mod:`dinov3_ray.model.golden`) decides whether a checkpoint may be used with it.

torchao 0.18 has the same layer (row-wise, with the same product of torch), is well kept, and works with torch 2.13. It
is not used, since all that it would save is the class below: it chooses devices by a list (GPUs from capability 8.9 on)
and refuses CPUs, on which the tests compare this layer with an exact one; its weights are tensors of a class of its
own; and it is 21 MB, with C++ parts that load only beside the torch that they were built for.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from dinov3_ray.errors import ConfigError, first_line
from dinov3_ray.model.device import TRIAL_TOKENS, trial_error

__all__ = ["Float8Linear", "check_float8", "multiply_in_float8"]

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max
_MULTIPLE = 16  # the kernel needs weights whose sides are multiples of it


class Float8Linear(nn.Module):
    """``linear`` (bfloat16, frozen) with its product in float8, row-wise scaled; the result has the input's dtype."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = _quantised(linear.weight.detach())
        # Not parameters: float8 tensors have no arithmetic with which to train, initialise or cast them.
        self.register_buffer("weight", weight.t())  # [in, out], column by column, as the product wants it
        self.register_buffer("scale", scale.t())  # [1, out]
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = _quantised(x.reshape(-1, x.shape[-1]))
        product = torch._scaled_mm(
            rows,
            self.weight,
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,  # sums of fewer bits in the tensor cores; without, Hopper loses much of its rate
        )
        return product.view(*x.shape[:-1], -1).to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:  # noqa: ARG002 - the signature is nn.Module's
        """``to()``, ``half()`` and the like end here: buffers change their device, but not their dtype."""
        device = fn(torch.empty(0, device=self.scale.device)).device
        for name, buffer in list(self.named_buffers()):
            setattr(self, name, buffer.to(device))
        return self


def _quantised(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix`` [rows, columns] in float8, and the scale of each row, float32 [rows, 1]."""
    full = matrix.float()
    # A row of zeros must not divide by zero.
    scale = full.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / _LARGEST
    return (full / scale).clamp_(-_LARGEST, _LARGEST).to(_FLOAT8), scale


def check_float8(blocks: nn.ModuleList, device: torch.device) -> None:
    """Try one product, that of the first float8 layer of ``blocks``.

    Raises:
        ConfigError: ``device`` cannot, with torch's reason.
    """
    layer = next((module for module in blocks.modules() if isinstance(module, Float8Linear)), None)
    if layer is None:
        return
    tokens = torch.zeros(TRIAL_TOKENS, len(layer.weight), dtype=torch.bfloat16, device=device)
    if error := trial_error(partial(layer, tokens), device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device
        raise ConfigError(
            f"dtype='float8' must be one in which the device multiplies matrices; on {name}, torch {torch.__version__} "
            f"fails with {first_line(error)} (use dtype='bfloat16', or a GPU of compute capability 8.9 or "
            "later with a torch that was built for it)"
        ) from error


def multiply_in_float8(blocks: nn.ModuleList) -> None:
    """Replace the linear layers of ``blocks`` (bfloat16) by float8 ones, in place."""
    for parent in list(blocks.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and not any(side % _MULTIPLE for side in child.weight.shape):
                setattr(parent, name, Float8Linear(child))
