"""Images and features as contiguous NumPy arrays and back, without a copy.

Ray moves NumPy arrays out of band (pickle 5) and hands them out as views of shared memory, while it copies torch
tensors on every fetch; so no torch tensor ever crosses. bfloat16 has no NumPy type and crosses viewed as int16. Ray
copies arrays that are not contiguous, so a map in channels_last order crosses as [B, h, w, D], and is [B, D, h, w]
again at the client.

What arrives is read-only memory of the object store. A fetched result belongs to the one client that asked for it (each
answer is a separate object, fetched once), so its tensors may alias that memory and are safe to write to. Images
that a replica receives alias the sender's object: teachers only read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dinov3_ray.features import Encoded, Features, FeatureSpec, channel_dim, decode, encode, in_channels_last
from dinov3_ray.images import ImageBatch
from dinov3_ray.pool.messages import Array, FeatureLayout, ImageLayout

__all__ = ["alias", "pack_features", "pack_images", "unpack_features", "unpack_images"]


def pack_images(batch: ImageBatch) -> tuple[ImageLayout, list[Array]]:
    """Arrays that share the batch's memory wherever it is contiguous and on the CPU."""
    return (_name(batch.dtype), batch.stacked is not None), [_to_array(tensor) for tensor in batch.tensors]


def unpack_images(layout: ImageLayout, arrays: Sequence[Array]) -> ImageBatch:
    dtype, stacked = layout
    tensors = tuple(_to_tensor(array, dtype) for array in arrays)
    return ImageBatch(stacked=tensors[0]) if stacked else ImageBatch(stacked=None, ragged=tensors)


def pack_features(
    features: Features, spec: FeatureSpec, to_host: Callable[[Tensor], Tensor] = Tensor.cpu
) -> tuple[FeatureLayout, list[Array]]:
    """``features`` (compute dtype), narrowed as ``spec.dtype`` has it on their own device, in their own memory order.

    ``to_host`` copies what was narrowed to the CPU; if it only begins to, the arrays hold their values when it is done.
    """
    layout, arrays = [], []
    for name, tensor in features.named():
        encoded = encode(tensor, spec.dtype, channel_dim=channel_dim(name))
        has_scale = encoded.scale is not None
        channels_last = tensor.ndim == 4 and in_channels_last(tensor)
        layout.append((name, _name(encoded.values.dtype), _name(encoded.result_dtype), has_scale, channels_last))
        values = encoded.values.permute(0, 2, 3, 1) if channels_last else encoded.values
        arrays.append(_to_array(to_host(values)))
        if encoded.scale is not None:
            arrays.append(_to_array(to_host(encoded.scale)))
    return tuple(layout), arrays


def unpack_features(layout: FeatureLayout, arrays: Sequence[Array], fingerprint: str | None) -> Features:
    """The features as the caller gets them."""
    named, remaining = {}, iter(arrays)
    for name, dtype, result_dtype, has_scale, channels_last in layout:
        values = _to_tensor(next(remaining), dtype)
        if channels_last:
            values = values.permute(0, 3, 1, 2)
        scale = _to_tensor(next(remaining), "float32") if has_scale else None
        named[name] = decode(Encoded(values, scale, _dtype(result_dtype)))
    return Features.from_named(named, fingerprint)


def alias(array: Array) -> Array:
    """``array`` as a writable view of the same memory, which it keeps alive.

    torch has no read-only tensors and warns about every read-only array, so it is shown one that does not say so.
    """
    return array if array.flags.writeable else np.asarray(_Writable(array))


class _Writable:
    """NumPy's array interface over another array's memory, without its read-only flag."""

    def __init__(self, array: Array) -> None:
        self._array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def _to_array(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return tensor.numpy()


def _to_tensor(array: Array, dtype: str) -> Tensor:
    tensor = torch.from_numpy(alias(array))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
