"""The activation of a feed-forward network by the name that config.json has for it."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from dinov3_ray.errors import ConfigError

__all__ = ["activation"]

_PUBLISHED: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that transformers knows by ``name``.

    Raises:
        ConfigError: there is none.
    """
    if name in _PUBLISHED:
        return _PUBLISHED[name]
    from transformers.activations import ACT2FN  # here, since it takes a second, and no published model needs it

    if name not in ACT2FN:
        raise ConfigError(f"hidden_act must be one of transformers' activations; got {name!r}")
    found: Callable[[Tensor], Tensor] = ACT2FN[name]
    return found
