"""What a forward pass has to compute, from the architecture alone."""

from __future__ import annotations

import math

from dinov3_ray.config.architecture import Architecture, ConvNextArchitecture
from dinov3_ray.config.preprocessing import Size

__all__ = ["flops_per_image"]


def flops_per_image(architecture: Architecture, image_size: Size) -> float:
    """Floating-point operations (a multiplication and an addition are two) of all matrix products for one image.

    Norms, activations, RoPE and softmax are left out: they are a few per cent, and bound by memory.

    Args:
        architecture: of the model.
        image_size: (h, w) of its input, in pixels.
    """
    cells = [_cells(image_size, stride) for stride in architecture.layer_strides]
    total = 0.0
    for name, shape in architecture.tensors().items():
        if not name.endswith("weight") or len(shape) == 1:
            continue
        if isinstance(architecture, ConvNextArchitecture):
            # Each weight of a stage meets each cell of it once, in its convolutions and linear layers alike.
            positions = cells[int(name.split(".")[1])]
        else:
            embeds = name.startswith("embeddings.")
            positions = cells[0] + (0 if embeds else 1 + architecture.num_register_tokens)
        total += 2.0 * math.prod(shape) * positions
    if not isinstance(architecture, ConvNextArchitecture):
        tokens = cells[0] + 1 + architecture.num_register_tokens
        # Queries by keys, and the result by values.
        total += 4.0 * tokens**2 * architecture.hidden_size * architecture.num_layers
    return total


def _cells(image_size: Size, stride: int) -> int:
    return (image_size[0] // stride) * (image_size[1] // stride)
