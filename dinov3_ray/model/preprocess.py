"""Images to a model's input, with the arithmetic of transformers' own image processor, on the teacher's device.

DINOv3's order is rescale, resize, crop, normalize (``models/dinov3_vit/image_processing_dinov3_vit.py``), all in
float32. Those of other models resize uint8 images as such, crop, and rescale and normalize in one step
(``TorchvisionBackend`` in ``image_processing_backends.py``); float images are resized as they are. Each step uses the
processor's own torch operation, so that on one device the results are the same bits.

Shapes: B images, height H and width W before, h and w after.
"""

from __future__ import annotations

import platform
from functools import cache, lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_ray.config.preprocessing import Preprocessing, Resample, Size
from dinov3_ray.images import ImageBatch

__all__ = ["preprocess"]


def preprocess(batch: ImageBatch, rule: Preprocessing, device: torch.device) -> Tensor:
    """The model's input for ``batch``: float32 [B,3,h,w] on ``device``.

    uint8 values are multiplied by the rule's ``rescale_factor``; floats must be in [0, 1] already. Images of one size
    are resized together, wherever they are in the batch. The result for each is that of the image alone, bit for bit.

    Raises:
        InputError: the rule keeps the images' aspect, or follows their size, and so brings them to different sizes.
    """
    size = rule.common_input_size(batch.sizes)
    if device.type not in ("cpu", "cuda"):  # on others, such as MPS before torch 2.8, the resize does not exist
        return preprocess(batch, rule, torch.device("cpu")).to(device)
    if batch.stacked is not None:
        return _transform(batch.stacked, rule, device)
    groups: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for index, image in enumerate(batch.ragged):
        groups.setdefault((image.shape, image.device), []).append(index)
    parts = [
        (members, _transform(torch.stack([batch.ragged[index] for index in members]), rule, device))
        for members in groups.values()
    ]
    if len(parts) == 1:
        return parts[0][1]
    pixels_B3hw = torch.empty(len(batch), 3, *size, device=device)
    for members, part in parts:
        for index, pixels_3hw in zip(members, part, strict=True):
            pixels_B3hw[index] = pixels_3hw  # indexing by a list copies it to the device, and waits
    return pixels_B3hw


def _transform(images_B3HW: Tensor, rule: Preprocessing, device: torch.device) -> Tensor:
    # Fewer bytes are copied to the device: uint8 and half floats are widened there, float64 is narrowed here.
    if images_B3HW.dtype == torch.float64:
        images_B3HW = images_B3HW.float()
    # Contiguous, as in the processor: for another memory format (a transposed NumPy image) torch may choose another
    # kernel, with other bits.
    images_B3HW = images_B3HW.to(device).contiguous()
    rescaled = images_B3HW.is_floating_point()
    pixels = images_B3HW.float() if rescaled else images_B3HW
    if rule.rescales_first and not rescaled:
        pixels, rescaled = pixels * rule.rescale_factor, True
    view = (pixels.shape[-2], pixels.shape[-1])
    size = rule.resized_size(view)
    if size != view:
        pixels = _resize(pixels, size, rule.resample)
    if rule.crop_size is not None:
        pixels = _center_crop(pixels, rule.crop_size)
    elif rule.follows is not None:
        height, width = rule.input_size(view)
        pixels = pixels[..., :height, :width].contiguous()
    if not rescaled and not any(rule.mean) and set(rule.std) == {1.0}:  # nothing to normalize
        return pixels * rule.rescale_factor
    scale = 1.0 if rescaled else 1.0 / rule.rescale_factor
    mean, std = _statistics(rule.mean, rule.std, scale, device)
    return pixels.float().sub(mean).div_(std)


def _resize(pixels: Tensor, size: Size, resample: Resample) -> Tensor:
    """``pixels`` at another size, in their own dtype, as ``torchvision.transforms.v2.functional.resize`` has it."""
    resize = partial(F.interpolate, size=size, mode=resample, align_corners=False, antialias=True)
    if pixels.is_floating_point() or (pixels.device.type == "cpu" and _resizes_uint8(resample)):
        return resize(pixels)
    resized = resize(pixels.float())
    if resample == "bicubic":  # which overshoots
        resized.clamp_(0, 255)
    return resized.round_().to(pixels.dtype)


@cache
def _resizes_uint8(resample: Resample) -> bool:
    """Whether torchvision leaves the resize of uint8 images to torch's integer kernel on this CPU."""
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in ("aarch64", "arm64")
    return resample == "bicubic" or fast


def _center_crop(pixels: Tensor, size: Size) -> Tensor:
    """The centre of ``pixels``. A larger crop is padded with black; an odd pixel is added at the right or below."""
    missing_h, missing_w = (max(want - have, 0) for want, have in zip(size, pixels.shape[-2:], strict=True))
    if missing_h or missing_w:
        pixels = F.pad(pixels, (missing_w // 2, (missing_w + 1) // 2, missing_h // 2, (missing_h + 1) // 2))
    top, left = ((have - want) // 2 for want, have in zip(size, pixels.shape[-2:], strict=True))
    return pixels[..., top : top + size[0], left : left + size[1]].contiguous()


@lru_cache(maxsize=32)
def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], scale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and std, times ``scale``, as [3,1,1], cached: copying them to a GPU for each batch would wait for the work
    queued there."""
    return (
        torch.tensor(mean, dtype=torch.float32, device=device).mul(scale).view(3, 1, 1),
        torch.tensor(std, dtype=torch.float32, device=device).mul(scale).view(3, 1, 1),
    )
