"""Linear layers that multiply in float8: half of bfloat16's bytes, and twice its rate on GPUs that have it.

Weights are quantised once, with a scale per output channel; inputs in each pass, with a scale per token. Everything
outside the matrix products stays bfloat16. float8 is less exact than bfloat16, so ``auto`` never chooses it, and the
golden check (:mod:`dinov3_ray.model.golden`) decides whether a checkpoint may be used with it.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from dinov3_ray.errors import ConfigError

__all__ = ["Float8Linear", "multiply_in_float8"]

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max
_LEAST_CAPABILITY = (9, 0)  # Hopper: torch's row-wise scaled product needs it
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
            rows, self.weight, scale_a=scale, scale_b=self.scale, bias=self.bias, out_dtype=torch.bfloat16
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


def multiply_in_float8(blocks: nn.ModuleList, device: torch.device) -> None:
    """Replace the linear layers of ``blocks`` (bfloat16) by float8 ones, in place.

    Raises:
        ConfigError: ``device`` is a CUDA device without such products.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        raise ConfigError(
            f"dtype='float8' needs a GPU of compute capability {'.'.join(map(str, _LEAST_CAPABILITY))} or later "
            f"(Hopper); {torch.cuda.get_device_name(device)} does not have them: use dtype='bfloat16'"
        )
    for parent in list(blocks.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and not any(side % _MULTIPLE for side in child.weight.shape):
                setattr(parent, name, Float8Linear(child))
