"""Which teacher computes which image of a batch: images go out by teacher, and their targets come back in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dinov3_ray.errors import ConfigError, SpecError
from dinov3_ray.features import Features, in_channels_last
from dinov3_ray.images import ImageBatch, Images

__all__ = ["join_targets", "split_images"]


def split_images(images: Images, route: Sequence[str]) -> dict[str, Images]:
    """The images that each teacher of ``route`` gets, in the batch's order.

    Args:
        images: of B images. If one teacher gets all of them, they are handed on as they are.
        route: the name of each image's teacher.

    Raises:
        ConfigError: ``route`` names another number of teachers than B.
        InputError: the images break a rule.
    """
    batch = ImageBatch.of(images)
    if len(route) != len(batch):
        raise ConfigError(f"route must name one teacher per image; got {len(route)} names for {len(batch)} images")
    rows = _rows_by_teacher(route)
    if len(rows) == 1:
        return dict.fromkeys(rows, images)
    if batch.stacked is not None:
        stacked = batch.stacked
        return {name: stacked[torch.tensor(mine, device=stacked.device)] for name, mine in rows.items()}
    return {name: [batch.ragged[row] for row in mine] for name, mine in rows.items()}


def join_targets(features: Mapping[str, Features], route: Sequence[str]) -> Features:
    """The targets of a whole batch, each image's from its own teacher; without a fingerprint if they are of several.

    Raises:
        SpecError: the teachers' targets differ in outputs, shape, dtype or device, so that no tensor holds them.
    """
    rows = _rows_by_teacher(route)
    if len(rows) == 1:
        return next(iter(features.values()))
    kinds = {name: _kinds(each) for name, each in features.items()}
    (first, expected), *others = kinds.items()
    for name, kind in others:
        if kind != expected:
            raise SpecError(
                "with route, the targets of all teachers must have the same outputs, channels, size, dtype and device; "
                f"{first!r} gives {_described(expected)}, and {name!r} gives {_described(kind)} (choose map_size and "
                "dtype in their FeatureSpecs, and prefetch's device; teachers of different widths cannot share a "
                "tensor: without route, each computes all images)"
            )
    named: dict[str, Tensor] = {}
    for output, tensor in features[first].named():
        order = torch.channels_last if tensor.ndim == 4 and in_channels_last(tensor) else torch.contiguous_format
        shape = (len(route), *tensor.shape[1:])
        named[output] = torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=order)
    for name, mine in rows.items():
        for output, tensor in features[name].named():
            named[output][torch.tensor(mine, device=tensor.device)] = tensor
    return Features.from_named(named)


def _rows_by_teacher(route: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(route):
        rows.setdefault(name, []).append(row)
    return rows


_Kind = tuple[tuple[int, ...], torch.dtype, torch.device]


def _kinds(features: Features) -> dict[str, _Kind]:
    return {name: (tuple(tensor.shape[1:]), tensor.dtype, tensor.device) for name, tensor in features.named()}


def _described(kinds: Mapping[str, _Kind]) -> str:
    return ", ".join(
        f"{name} {list(shape)} in {str(dtype).removeprefix('torch.')} on {device}"
        for name, (shape, dtype, device) in kinds.items()
    )
