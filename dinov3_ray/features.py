"""The outputs that a :class:`FeatureSpec` asks for (:class:`Features`).

The local teacher and both ends of the wire use the same ``encode`` and ``decode``, so that a local and a remote teacher
give the same bits. Shapes: B images, D channels, h × w patches, R register tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import MappingKey, register_pytree_node
from torch.utils.data._utils.collate import default_collate_fn_map

from dinov3_ray.feature_spec import FeatureSpec, ResultDtype

__all__ = [
    "Encoded",
    "FeatureSpec",
    "Features",
    "ResultDtype",
    "channel_dim",
    "copy_row",
    "decode",
    "deliver",
    "encode",
    "in_channels_last",
    "resample_map",
]


_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A result as it crosses the wire: ``values``, and for int8 one float32 ``scale`` per token."""

    values: Tensor
    scale: Tensor | None
    result_dtype: torch.dtype


def encode(tensor: Tensor, dtype: ResultDtype, *, channel_dim: int) -> Encoded:
    """Narrow ``tensor`` (compute dtype) to what crosses the wire.

    The wire carries the narrower of ``dtype`` and the compute dtype. int8 is symmetric with one scale per token: the
    largest magnitude along ``channel_dim`` maps to 127, so the error of a channel is at most 1/254 of that magnitude
    (before rounding to the compute dtype).
    """
    if dtype == "native":
        return Encoded(tensor, None, tensor.dtype)
    if dtype == "int8":
        full = tensor.float()
        # Never below the least normal float32: a device that flushes smaller ones to zero would divide by it.
        scale = (full.abs().amax(dim=channel_dim, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        # The division may round up to 127.5: clamp keeps the value in range.
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


class Features(OrderedDict[str, Any]):
    """A teacher's outputs for B images. Those that the spec did not ask for are None (``layers``: empty).

    They are ordinary tensors. Maps of this package's teachers, local and remote, are in channels_last memory order, in
    which they are computed: ``flatten(2)`` and ``view(B, D, h * w)`` are views, and ``flatten(2).mT`` is contiguous.
    Maps that a store or a cache has kept come contiguous; those of a teacher of your own, in its own order. Code that
    needs one order calls ``contiguous()``.

    It is a dict of the outputs that are there, with ``layers`` as a dict in it, so that code which moves, casts, pins,
    collates, slices or gathers batches treats it as the tensors that it holds: torch (DataLoader, pytree, DDP, FSDP),
    Lightning and Fabric, accelerate, and transformers' Trainer. Only ``len()`` is not a dict's: it is B. Such code
    makes a new dict, without the fingerprint; ``DataLoader`` collates by joining the images of all samples.

    Args:
        cls: [B, D]; or the outputs by name, as a mapping or as pairs.
        feature_map: [B, D, h, w].
        registers: [B, R, D].
        layers: block index, as the spec has it, to [B, D, h, w].
        fingerprint: identifies the weights, configuration and preprocessing; None if the teacher has none.
    """

    def __init__(
        self,
        cls: Tensor | Mapping[str, Any] | Iterable[tuple[str, Any]] | None = None,
        feature_map: Tensor | None = None,
        registers: Tensor | None = None,
        layers: Mapping[int, Tensor] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        by_name = cls is not None and not isinstance(cls, Tensor)
        super().__init__(cls if by_name else ())  # type: ignore[arg-type]
        self.fingerprint: str | None = fingerprint or getattr(cls, "fingerprint", None)
        given = {"cls": None if by_name else cls, "feature_map": feature_map, "registers": registers}
        self.update((name, tensor) for name, tensor in given.items() if tensor is not None)
        if layers:
            self["layers"] = dict(layers)

    @property
    def cls(self) -> Tensor | None:
        """[B, D]."""
        return self.get("cls")

    @property
    def feature_map(self) -> Tensor | None:
        """[B, D, h, w]."""
        return self.get("feature_map")

    @property
    def registers(self) -> Tensor | None:
        """[B, R, D]."""
        return self.get("registers")

    @property
    def layers(self) -> Mapping[int, Tensor]:
        """Block index, as the spec has it, to [B, D, h, w]."""
        layers: Mapping[int, Tensor] = self.get("layers", {})
        return layers

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor that is there with its name: ``cls``, ``feature_map``, ``registers``, ``layers.4``, ..."""
        yield from ((name, self[name]) for name in ("cls", "feature_map", "registers") if name in self)
        yield from ((f"layers.{index}", tensor) for index, tensor in self.layers.items())

    @classmethod
    def from_named(cls, named: Mapping[str, Tensor], fingerprint: str | None = None) -> Features:
        """The reverse of :meth:`named`."""
        layers = {int(name[7:]): tensor for name, tensor in named.items() if name.startswith("layers.")}
        return cls(named.get("cls"), named.get("feature_map"), named.get("registers"), layers, fingerprint)

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Features:
        """A new Features with ``function(name, tensor)`` in place of each tensor."""
        named = {name: function(name, tensor) for name, tensor in self.named()}
        return Features.from_named(named, self.fingerprint)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Features:
        """The same features on ``device``."""
        return self.map(lambda _, tensor: tensor.to(device, non_blocking=non_blocking))

    def rows(self, start: int, stop: int) -> Features:
        """Those of images ``start`` to ``stop`` (exclusive), as views."""
        return self.map(lambda _, tensor: tensor[start:stop])

    @classmethod
    def cat(cls, parts: Sequence[Features]) -> Features:
        """Rejoin parts of one batch along B, in order; a single part is returned as it is."""
        first = parts[0]
        if len(parts) == 1:
            return first
        columns = [dict(part.named()) for part in parts]
        named = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
        fingerprints = {part.fingerprint for part in parts}
        return cls.from_named(named, first.fingerprint if len(fingerprints) == 1 else None)

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.named())

    def __len__(self) -> int:
        """B, the number of images."""
        return next((tensor.shape[0] for _, tensor in self.named()), 0)

    # Two of them are equal if they are the same object, as tensors cannot be compared by one bool.
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __repr__(self) -> str:
        parts = [f"{name}={str(tensor.dtype)[6:]}{list(tensor.shape)}" for name, tensor in self.named()]
        return f"Features({', '.join(parts)})"


def _collate(samples: Sequence[Features], *, collate_fn_map: object = None) -> Features:  # noqa: ARG001 - torch's
    return Features.cat(samples)


# How torch extends its walkers over batches: torch.utils.data.default_collate documents the first.
default_collate_fn_map[Features] = _collate
register_pytree_node(
    Features,
    lambda features: (list(features.values()), (list(features), features.fingerprint)),
    lambda values, context: Features(zip(context[0], values, strict=True), fingerprint=context[1]),
    flatten_with_keys_fn=lambda features: (
        [(MappingKey(name), value) for name, value in features.items()],
        (list(features), features.fingerprint),
    ),
    serialized_type_name="dinov3_ray.features.Features",
)


def channel_dim(name: str) -> int:
    """The dimension of D in the output called ``name`` (see :meth:`Features.named`)."""
    return 1 if name == "feature_map" or name.startswith("layers.") else -1


def deliver(features: Features, spec: FeatureSpec) -> Features:
    """``features`` (compute dtype) in ``spec.dtype``, rounded exactly as on the wire."""
    if spec.dtype == "native":
        return features
    return features.map(lambda name, tensor: decode(encode(tensor, spec.dtype, channel_dim=channel_dim(name))))


def in_channels_last(map_BDhw: Tensor) -> bool:
    """Whether the memory of maps [B, D, h, w] is that of contiguous [B, h, w, D], as torch's channels_last is.

    ``is_contiguous(memory_format=torch.channels_last)`` ignores the strides of sides of 1. Here all must be right, so
    that a map which crosses the wire as [B, h, w, D] arrives with the strides that it had.
    """
    _, channels, height, width = map_BDhw.shape
    return map_BDhw.stride() == (height * width * channels, 1, width * channels, channels)


def copy_row(target: Tensor, row: Tensor) -> None:
    """Copy one image's output, [D], [R, D] or [D, h, w], to ``target``, which is contiguous: files have that order.

    torch transposes a matrix three times as fast as it permutes a map, so a map is copied as one.
    """
    target.view(len(row), -1).copy_(row.reshape(len(row), -1))


def resample_map(map_BDhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample maps [B, D, h, w] to ``size``: area pooling where they shrink, bilinear where they grow.

    It computes in float32 at least, since bfloat16 is too coarse for an area mean. The result has the input's dtype.
    """
    height, width = map_BDhw.shape[-2:]
    if (height, width) == size:
        return map_BDhw
    if map_BDhw.device.type == "mps":  # which pools only where the sizes divide (pytorch issue 143864)
        return resample_map(map_BDhw.cpu(), size).to(map_BDhw.device)
    smaller = (min(height, size[0]), min(width, size[1]))
    resampled = map_BDhw.to(torch.promote_types(map_BDhw.dtype, torch.float32))
    if smaller != (height, width):
        resampled = F.interpolate(resampled, size=smaller, mode="area")
    if smaller != size:
        resampled = F.interpolate(resampled, size=size, mode="bilinear", align_corners=False)
    return resampled.to(map_BDhw.dtype)
