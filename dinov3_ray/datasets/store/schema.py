"""What a part (one Parquet file) holds, and how Features become its columns and come back.

One row per image: ``id``, ``height`` and ``width`` of the original, ``view`` (the digest of its decoded pixels, see
:mod:`~dinov3_ray.datasets.decode`), and each output as a column of lists of a fixed size (see ``pages``): ``cls`` [D],
``feature_map`` [D,h,w], ``registers`` [R,D], ``layers_4`` [D,h,w]. An int8 output has a float32 column
``feature_map_scale`` too, with one scale per token: [1,h,w], or [1] and [R,1]. Names have no dots, which Lance refuses.

Arrow and Parquet have no bfloat16. Values of that dtype are stored as float32, which holds each of them exactly, at
twice the size, and come back as bfloat16; ``dtype="float16"`` stores them at their own size instead (more mantissa,
less range: a value beyond 65504 is an error, not an infinity).

Values of a column are one contiguous array in the file (see ``pages``), whose offset the ledger notes, and which
readers map instead of decoding. int8 columns of fewer than 256 values have no offset, and are decoded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dinov3_ray.datasets.store.pages import write_mappable
from dinov3_ray.errors import NumericsError, SpecError, StoreError
from dinov3_ray.feature_spec import FeatureSpec

if TYPE_CHECKING:
    from torch import Tensor

    from dinov3_ray.features import Features

__all__ = [
    "FORMAT",
    "METADATA_KEY",
    "SCALE",
    "Column",
    "Row",
    "check_format",
    "decode_columns",
    "encode_columns",
    "encode_part",
    "spec_of",
    "spec_to_json",
]

FORMAT = 2
"""Of a store: what its parts hold, and where. It is in the run's identity."""

METADATA_KEY = b"dinov3_ray"
"""Of a part's schema metadata: the run's identity as JSON."""

SCALE = "_scale"
"""Behind the name of an int8 column: the column of its scales."""


@dataclass(frozen=True, slots=True)
class Column:
    """A tensor column of a part: NumPy ``dtype``, ``shape`` per row, and where its values lie (None: to be decoded)."""

    dtype: str
    shape: tuple[int, ...]
    offset: int | None

    @property
    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Column:
        return cls(value["dtype"], tuple(value["shape"]), value["offset"])


@dataclass(frozen=True, slots=True)
class Row:
    """What a part holds of one image besides its features."""

    id: str
    height: int
    width: int
    view: bytes


def check_format(path: str, plan: Mapping[str, Any]) -> None:
    """Raise StoreError unless ``plan``, the identity of the run that filled the store at ``path``, says FORMAT."""
    found = plan.get("format")
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        remedy = "install the release that wrote it" if newer else "extract the images again, into another folder"
        raise StoreError(
            f"a feature store must have format {FORMAT} for this release; {path} has "
            f"{'none' if found is None else f'format {found}'}. Remedy: {remedy}"
        )


def spec_to_json(spec: FeatureSpec) -> dict[str, Any]:
    """As plain JSON values, so that what was read equals what was written."""
    value: dict[str, Any] = json.loads(json.dumps(asdict(spec)))
    return value


def spec_of(value: Mapping[str, Any]) -> FeatureSpec:
    """The reverse of :func:`spec_to_json`."""
    size = value["map_size"]
    return FeatureSpec(**{**value, "layers": tuple(value["layers"]), "map_size": None if size is None else tuple(size)})


def encode_columns(features: Features, spec: FeatureSpec) -> tuple[dict[str, np.ndarray], str]:
    """Features (compute dtype) as the arrays [B, ...] that are stored for ``spec.dtype``, and their result dtype.

    The arrays keep the features' memory order.

    Raises:
        SpecError: an output has no values, such as the registers of a model without them.
        NumericsError: float16 cannot hold a value.
    """
    import torch  # here and below, since a run is planned, and a store listed, without it

    from dinov3_ray.features import channel_dim, encode

    columns: dict[str, np.ndarray] = {}
    result_dtype = "float32"
    for output, tensor in features.named():
        if not tensor.shape[1:].numel():  # which Parquet's writer may take for a division by zero
            raise SpecError(f"outputs to be stored must have values; {output} is {list(tensor.shape)}: leave it out")
        encoded = encode(tensor, spec.dtype, channel_dim=channel_dim(output))
        values = encoded.values.float() if encoded.values.dtype == torch.bfloat16 else encoded.values
        if values.dtype == torch.float16 and not torch.isfinite(values).all() and torch.isfinite(tensor).all():
            raise NumericsError(
                f"dtype float16 holds values up to 65504; output {output} reaches {tensor.float().abs().amax():.4g} "
                "(store float32 instead)"
            )
        name = output.replace(".", "_")  # layers.4 is a column layers_4
        columns[name] = values.cpu().numpy()
        if encoded.scale is not None:
            columns[name + SCALE] = encoded.scale.cpu().numpy()
        result_dtype = str(encoded.result_dtype).removeprefix("torch.")
    return columns, result_dtype


def decode_columns(columns: Mapping[str, np.ndarray], result_dtype: str, fingerprint: str | None) -> Features:
    """The reverse of :func:`encode_columns`: what the teacher's own ``extract`` gave, for arrays [B, ...].

    The arrays must be writable; float tensors share their memory.
    """
    import torch

    from dinov3_ray.features import Encoded, Features, decode

    dtype: torch.dtype = getattr(torch, result_dtype)
    named: dict[str, Tensor] = {}
    for name, array in columns.items():
        if not name.endswith(SCALE):
            scale = columns.get(name + SCALE)
            scales = None if scale is None else torch.from_numpy(scale)
            named[name.replace("layers_", "layers.")] = decode(Encoded(torch.from_numpy(array), scales, dtype))
    return Features.from_named(named, fingerprint)


def encode_part(
    rows: Sequence[Row], columns: Mapping[str, np.ndarray], identity: Mapping[str, Any]
) -> tuple[pa.Buffer, dict[str, Column]]:
    """A whole Parquet file of ``rows`` and their ``columns`` [len(rows), ...], and what it holds where."""
    plain = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "height": pa.array([row.height for row in rows], pa.int32()),
        "width": pa.array([row.width for row in rows], pa.int32()),
        "view": pa.array([row.view for row in rows], pa.binary()),
    }
    buffer, offsets = write_mappable(plain, columns, {METADATA_KEY: json.dumps(identity)})
    described = {
        name: Column(array.dtype.str, tuple(array.shape[1:]), offsets.get(name)) for name, array in columns.items()
    }
    return buffer, described
