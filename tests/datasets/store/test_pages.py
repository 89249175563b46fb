"""Tensor columns of a Parquet file: what a reader decodes, and what stands at the offset, are the values."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov3_ray.datasets.store import pages
from dinov3_ray.datasets.store.pages import unnest, write_mappable

ID = {"id": pa.array(["a", "b"])}


def read(buffer: pa.Buffer, name: str) -> np.ndarray:
    column = pq.read_table(pa.BufferReader(buffer))[name]
    shape, kind = [], column.type
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    return unnest(column, tuple(shape))


@pytest.mark.parametrize("count", [1, 127, 128, 129, 252, 253, 4096, 100_003])
@pytest.mark.parametrize("kind", ["random", "equal", "runs"])
def test_int8_of_any_length_and_content(count: int, kind: str) -> None:
    values = np.random.default_rng(count).integers(-128, 128, (2, count), dtype=np.int8)
    if kind == "equal":
        values[:] = -3
    if kind == "runs":
        values = np.ascontiguousarray(np.sort(values, axis=1))
    buffer, offsets = write_mappable(ID, {"x": values}, {})
    assert np.array_equal(read(buffer, "x"), values)
    assert ("x" in offsets) == (values.size >= 256)  # of fewer, not all have an entry in the dictionary
    if offsets:
        assert np.array_equal(np.frombuffer(buffer, np.int8, values.size, offsets["x"]), values.reshape(-1))


def test_what_pyarrow_writes_otherwise_is_left_to_be_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(-128, 128, (2, 5000), dtype=np.int8)
    floats = values.astype(np.float32)
    monkeypatch.setattr(pages, "_ONE_PAGE", 1000)  # stands for a release that cuts pages differently
    buffer, offsets = write_mappable(ID, {"x": values, "y": floats}, {})
    assert offsets == {}
    assert np.array_equal(read(buffer, "x"), values)
    assert np.array_equal(read(buffer, "y"), floats)
