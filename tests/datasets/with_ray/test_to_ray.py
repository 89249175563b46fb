"""``FeatureStore.to_ray``, and the files of a store in Ray Data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray.data
import torch
from stores import COUNT, build, ids, several_shapes

from dinov3_ray.datasets import FeatureStore
from dinov3_ray.datasets.store.pages import unnest
from dinov3_ray.errors import StoreError
from dinov3_ray.features import FeatureSpec, ResultDtype
from dinov3_ray.testing import FakeTeacher

OUTPUTS: dict[str, Any] = {"cls": True, "feature_map": True, "registers": True, "layers": (-1, 0), "map_size": (3, 5)}


@pytest.mark.parametrize(
    ("dtype", "compute"), [("native", torch.bfloat16), ("int8", torch.bfloat16), ("float16", torch.float32)]
)
def test_rows_are_arrays_in_the_store_s_order(
    dtype: ResultDtype, compute: torch.dtype, ray_cluster: str, tmp_path: Path
) -> None:
    build(tmp_path, FeatureSpec(**OUTPUTS, dtype=dtype), FakeTeacher(dtype=compute))
    store = FeatureStore(tmp_path)
    before = ray.data.DataContext.get_current().execution_options.preserve_order
    dataset = store.to_ray()
    assert ray.data.DataContext.get_current().execution_options.preserve_order == before
    assert dataset.count() == COUNT
    rows = dataset.take_all()
    assert [row["id"] for row in rows] == ids()
    for row, (_, expected) in zip(rows, store.iter_batches(1), strict=True):
        assert (row["height"], row["width"]) == (48, 80)
        for name, tensor in expected.named():
            found = row[name.replace(".", "_")]
            assert found.dtype == ("float16" if dtype == "float16" else "float32")
            assert np.array_equal(found, tensor[0].float().numpy())
    batches = dataset.map_batches(lambda batch: {"mean": batch["feature_map"].mean(axis=(1, 2, 3))})
    means = np.concatenate([batch["mean"] for batch in batches.iter_batches(batch_size=7)])
    assert np.array_equal(means, np.array([row["feature_map"].mean() for row in rows], means.dtype))


def test_shapes_may_differ_and_parts_may_have_one_row(ray_cluster: str, tmp_path: Path) -> None:
    store = several_shapes(tmp_path)
    rows = store.to_ray().take_all()
    assert tuple(row["id"] for row in rows) == store.ids
    assert [row["feature_map"].shape for row in rows] == [(8, 2, 3), (8, 2, 3), (8, 4, 1)]
    for row in rows:
        assert np.array_equal(row["feature_map"], store.arrays(row["id"])["feature_map"])
    (tmp_path / "parts" / "0000000.1.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError, match=r"0000000.1.parquet is damaged.*Remedy: delete .*0000000.json"):
        store.to_ray().take_all()


def test_its_files_are_opened_with_their_shapes(ray_cluster: str, tmp_path: Path) -> None:
    build(tmp_path, FeatureSpec(**OUTPUTS, dtype="int8"), FakeTeacher())
    store = FeatureStore(tmp_path)
    dataset = ray.data.read_parquet(str(tmp_path / "parts"))
    kind = dict(zip(dataset.schema().names, dataset.schema().types, strict=True))["layers_-1"]
    shape = []
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    assert (shape, kind) == ([16, 3, 5], pa.int8())
    seen = 0
    for batch in dataset.iter_batches(batch_format="pyarrow"):
        maps = unnest(batch["layers_-1"], tuple(shape))
        for id_, found in zip(batch["id"].to_pylist(), maps, strict=True):
            assert np.array_equal(found, store.arrays(id_)["layers_-1"])
        seen += len(batch)
    assert seen == COUNT
