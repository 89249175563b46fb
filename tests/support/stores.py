"""Feature stores for tests, written as an extraction writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dinov3_ray.datasets import FeatureStore
from dinov3_ray.datasets.decode import Decoder, Unreadable, view_digest
from dinov3_ray.datasets.folder import Folder
from dinov3_ray.datasets.sources.open import open_source
from dinov3_ray.datasets.store.listing import save_rows
from dinov3_ray.datasets.store.schema import FORMAT, Row, encode_columns, spec_to_json
from dinov3_ray.datasets.store.writer import BlockWriter, finish
from dinov3_ray.features import Features, FeatureSpec, deliver
from dinov3_ray.model import DinoV3Teacher
from dinov3_ray.testing import FakeTeacher

SPEC = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(-1, 0), map_size=(3, 5))
COUNT = 50


def views(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (COUNT, 3, 48, 80), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def ids() -> list[str]:
    return [f"folder {index % 3}/ä{index:03}.jpg" for index in range(COUNT)]


def list_type(dtype: np.dtype | type, shape: Sequence[int]) -> pa.DataType:
    """Of a column whose rows are arrays of this shape."""
    kind = pa.from_numpy_dtype(dtype)
    for size in reversed(shape):
        kind = pa.list_(pa.field("element", kind, nullable=False), size)
    return kind


def build(out: Path, spec: FeatureSpec, teacher: FakeTeacher | DinoV3Teacher, *, end: bool = True) -> Features:
    """A store of three blocks of COUNT images in all, and one failure; gives what the teacher says for ``spec``."""
    folder = Folder.at(out)
    folder.make("parts")
    folder.make("ledger")
    images = views()
    native = teacher.extract(images, spec.native())
    _, result_dtype = encode_columns(native, spec)
    identity = {
        "format": FORMAT,
        "fingerprint": teacher.fingerprint,
        "spec": spec_to_json(spec),
        "result_dtype": result_dtype,
        "preprocessing": None,
        "batch_size": 13,
    }
    folder.write_json("plan.json", identity)
    for block, start in enumerate(range(0, COUNT, 20)):
        stop = min(start + 20, COUNT)
        writer = BlockWriter(folder, f"{block:07}", identity)
        rows = [Row(ids()[index], 48, 80, view_digest(images[index].numpy())) for index in range(start, stop)]
        # Batches come in any order, and are not those of the block.
        for low, high in ((13, 20), (0, 13)):
            low, high = start + low, min(start + high, stop)
            if low < high:
                positions = list(range(low - start, high - start))
                part = [rows[position] for position in positions]
                writer.add(positions, part, encode_columns(native.rows(low, high), spec)[0])
        if block == 1:
            writer.fail(20, "bad.jpg", Unreadable("truncated", "it ends early"))
        writer.commit()
    if end:
        finish(folder, identity)
    return deliver(native, spec)


def several_shapes(out: Path) -> FeatureStore:
    """Two rows with a map of 2x3, and one of 4x1."""
    folder, spec = Folder.at(out), FeatureSpec(feature_map=True)
    folder.make("parts")
    folder.make("ledger")
    identity = {
        "format": FORMAT,
        "fingerprint": "f",
        "spec": spec_to_json(spec),
        "result_dtype": "float32",
        "batch_size": 1,
    }
    folder.write_json("plan.json", identity)
    writer = BlockWriter(folder, "0000000", identity)
    for position, shape in enumerate([(2, 3), (4, 1), (2, 3)]):
        columns, _ = encode_columns(Features(feature_map=torch.rand(1, 8, *shape)), spec)
        writer.add([position], [Row(f"{position}.jpg", 9, 9, bytes([position] * 16))], columns)
    writer.commit()
    finish(folder, identity)
    return FeatureStore(out)


def store_of(
    source: Path,
    out: Path,
    spec: FeatureSpec = FeatureSpec(cls=True),  # noqa: B008
    names: Mapping[str, str] | None = None,
) -> FeatureStore:
    """The store of a source's images, decoded and computed in this process, as an extraction writes it.

    ``names`` are ids in place of the source's.
    """
    opened, teacher, decoder = open_source(source), FakeTeacher(), Decoder()
    rows = opened.rows()
    identity = {
        "format": FORMAT,
        "fingerprint": teacher.fingerprint,
        "spec": spec_to_json(spec),
        "result_dtype": "float32",
        "decoding": decoder.describe(),
        "source": opened.describe(),
        "batch_size": 1,
    }
    folder = Folder.at(out)
    folder.make("parts")
    folder.make("ledger")
    folder.write_json("plan.json", identity)
    save_rows(folder, rows, [(0, len(rows))])
    writer = BlockWriter(folder, "0000000", identity)
    contents = (content for piece in opened.slices(rows) for content in opened.read(piece))
    for position, (id_, content) in enumerate(contents):
        assert isinstance(content, bytes)
        pixels = decoder.read(content, id_)
        columns, _ = encode_columns(teacher.extract(pixels, spec), spec)
        id_ = id_ if names is None else names[id_]
        writer.add([position], [Row(id_, *pixels.shape[1:], view_digest(pixels))], columns)
    writer.commit()
    finish(folder, identity)
    return FeatureStore(out)


def fill(out: Path, spec: FeatureSpec, blocks: Sequence[tuple[Sequence[str], Features]]) -> FeatureStore:
    """A store of one block for each (ids, features in the compute dtype); images are 30 x 40 px."""
    folder = Folder.at(out)
    folder.make("parts")
    folder.make("ledger")
    identity = {
        "format": FORMAT,
        "fingerprint": "random",
        "spec": spec_to_json(spec),
        "result_dtype": encode_columns(blocks[0][1], spec)[1],
        "preprocessing": None,
        "batch_size": 8,
    }
    folder.write_json("plan.json", identity)
    for number, (names, features) in enumerate(blocks):
        writer = BlockWriter(folder, f"{number:07}", identity)
        rows = [Row(name, 30, 40, hashlib.blake2b(name.encode(), digest_size=16).digest()) for name in names]
        writer.add(range(len(rows)), rows, encode_columns(features, spec)[0])
        writer.commit()
    finish(folder, identity)
    return FeatureStore(out)
