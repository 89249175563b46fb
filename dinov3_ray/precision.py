"""How results are narrowed on their way to the caller, and widened again.

``encode`` and ``decode`` are used by the local teacher and on both ends of the wire alike, so that a local and a remote
teacher give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["Encoded", "ResultDtype", "decode", "encode"]

ResultDtype = Literal["native", "float32", "bfloat16", "float16", "int8"]
"""The dtype that a caller asks results in; ``native`` is the teacher's compute dtype."""

RESULT_DTYPES: tuple[str, ...] = get_args(ResultDtype)
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A result as it crosses the wire: ``values``, and for int8 one float32 ``scale`` a token."""

    values: Tensor
    scale: Tensor | None
    result_dtype: torch.dtype


def encode(tensor: Tensor, dtype: ResultDtype, *, channel_dim: int) -> Encoded:
    """Narrow ``tensor`` (compute dtype) to what crosses the wire.

    The wire carries the narrower of ``dtype`` and the compute dtype. int8 is symmetric with one scale a token: the
    largest magnitude along ``channel_dim`` maps to 127, so the error of a channel is at most 1/254 of that magnitude
    (before rounding to the compute dtype).
    """
    if dtype == "native":
        return Encoded(tensor, None, tensor.dtype)
    if dtype == "int8":
        full = tensor.float()
        # Never below the least normal float32: a device that flushes smaller ones to zero would divide by it.
        scale = (full.abs().amax(dim=channel_dim, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        # A division that rounds can reach 127.5 / 127: clamp keeps it in range.
        values = (full / scale).round_().clamp_(-127, 127).to(torch.int8)
        return Encoded(values, scale, tensor.dtype)
    wanted = _FLOATS[dtype]
    narrower = wanted if wanted.itemsize <= tensor.dtype.itemsize else tensor.dtype
    return Encoded(tensor.to(narrower), None, wanted)


def decode(encoded: Encoded) -> Tensor:
    """Widen what :func:`encode` gave to the result dtype."""
    if encoded.scale is None:
        return encoded.values.to(encoded.result_dtype)
    return (encoded.values.float() * encoded.scale).to(encoded.result_dtype)
