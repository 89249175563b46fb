"""A store in other people's tools: its files, which they open with shapes and values, and ``FeatureStore.to_datasets``.

Tools that are not installed are skipped; deploy/constraints.txt names those that the suite brings along.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest
import torch
from stores import build, ids, several_shapes
from torch.utils.data import DataLoader

from dinov3_ray.datasets import FeatureStore
from dinov3_ray.datasets.folder import Folder
from dinov3_ray.datasets.store.part import Part
from dinov3_ray.datasets.store.schema import FORMAT, spec_to_json
from dinov3_ray.datasets.store.writer import finish
from dinov3_ray.errors import ConfigError, StoreError
from dinov3_ray.features import FeatureSpec, ResultDtype
from dinov3_ray.testing import FakeTeacher

DTYPES = ("float32", "float16", "int8")
# Two negative numbers as layers would be one name; one shows that tools take the dash in it.
OUTPUTS: dict[str, Any] = {"cls": True, "feature_map": True, "registers": True, "layers": (-1, 4), "map_size": (3, 5)}


@pytest.fixture(params=DTYPES)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """The files of a store, and each column [rows, ...] that they have."""
    build(tmp_path, FeatureSpec(**OUTPUTS, dtype=request.param), FakeTeacher(depth=6))
    store = FeatureStore(tmp_path)
    rows = [store.arrays(id_) for id_ in store.ids]
    columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    assert ("feature_map_scale" in columns) == (request.param == "int8")
    assert {"cls", "registers", "layers_-1", "layers_4"} <= columns.keys()
    return sorted(str(path) for path in (tmp_path / "parts").iterdir()), columns


def same_values(found: Any, expected: np.ndarray) -> bool:
    """Whether ``found``, perhaps in a wider dtype, has the shape and the values of ``expected``."""
    array = np.asarray(found)
    return array.shape == expected.shape and array.dtype != object and np.array_equal(array, expected)


def test_pyarrow(opened: tuple[list[str], dict[str, np.ndarray]]) -> None:
    files, columns = opened
    table = pyarrow.dataset.dataset(files).to_table()
    assert table["id"].to_pylist() == ids()
    assert all(same_values(table[name].to_pylist(), values) for name, values in columns.items())


@pytest.mark.slow
def test_load_dataset(opened: tuple[list[str], dict[str, np.ndarray]], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", minversion="4.3")
    files, columns = opened
    for streaming in (False, True):
        cache = str(tmp_path / "hf")
        loaded = datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming, cache_dir=cache)
        assert lengths(loaded.features["feature_map"]) == columns["feature_map"].shape[1:]
        rows = list(loaded.with_format("numpy"))
        assert [str(row["id"]) for row in rows] == ids()
        for name, values in columns.items():
            assert same_values([row[name] for row in rows], values)


def lengths(feature: Any) -> tuple[int, ...]:
    return (feature.length, *lengths(feature.feature)) if hasattr(feature, "length") else ()


@pytest.mark.slow
def test_polars(opened: tuple[list[str], dict[str, np.ndarray]]) -> None:
    polars = pytest.importorskip("polars")
    files, columns = opened
    scanned = polars.scan_parquet(files)
    assert scanned.collect_schema()["feature_map"].shape == columns["feature_map"].shape[1:]
    frame = scanned.collect()
    assert frame["id"].to_list() == ids()
    assert all(same_values(frame[name].to_numpy(), values) for name, values in columns.items())


@pytest.mark.slow
def test_duckdb(opened: tuple[list[str], dict[str, np.ndarray]]) -> None:
    duckdb = pytest.importorskip("duckdb")
    files, columns = opened
    channels, height, width = columns["feature_map"].shape[1:]
    with duckdb.connect() as connection:
        found = connection.execute("select * from read_parquet(?)", [files]).to_arrow_table()
        assert found["id"].to_pylist() == ids()
        assert all(same_values(found[name].to_pylist(), values) for name, values in columns.items())
        # Its lists have no length until they are cast to arrays.
        shape = f"FLOAT[{width}][{height}][{channels}]"
        query = f"select typeof(feature_map::{shape}) from read_parquet(?) limit 1"
        assert connection.execute(query, [files]).fetchall() == [(shape,)]


def test_lance(opened: tuple[list[str], dict[str, np.ndarray]], tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    files, columns = opened
    written = lance.write_dataset(pyarrow.dataset.dataset(files).scanner().to_reader(), tmp_path / "x.lance")
    kind = written.schema.field("feature_map").type
    shape = []
    while hasattr(kind, "list_size"):
        shape.append(kind.list_size)
        kind = kind.value_type
    assert tuple(shape) == columns["feature_map"].shape[1:]
    taken = written.take([33, 3])
    assert taken["id"].to_pylist() == [ids()[33], ids()[3]]
    assert all(same_values(taken[name].to_pylist(), values[[33, 3]]) for name, values in columns.items())


def test_daft(opened: tuple[list[str], dict[str, np.ndarray]]) -> None:
    daft = pytest.importorskip("daft", minversion="0.7")  # 0.6 knows no float16
    files, columns = opened
    frame = daft.read_parquet(files)
    kind = frame.schema()["feature_map"].dtype
    shape = []
    while kind.is_fixed_size_list():
        shape.append(kind.size)
        kind = kind.dtype
    assert tuple(shape) == columns["feature_map"].shape[1:]
    found = frame.to_pydict()
    assert found["id"] == ids()
    assert all(same_values(found[name], values) for name, values in columns.items())


@pytest.mark.slow
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["native", "int8"])
def test_to_datasets(dtype: ResultDtype, compute: torch.dtype, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", minversion="4.3")
    build(tmp_path / "out", FeatureSpec(**OUTPUTS, dtype=dtype), FakeTeacher(depth=6, dtype=compute))
    store = FeatureStore(tmp_path / "out")
    mapped = store.to_datasets(cache_dir=tmp_path / "hf")
    streamed = store.to_datasets(streaming=True)
    wide = "float16" if compute == torch.float16 else "float32"
    assert (
        mapped.features
        == streamed.features
        == datasets.Features(
            {
                "id": datasets.Value("string"),
                "height": datasets.Value("int32"),
                "width": datasets.Value("int32"),
                "cls": datasets.List(datasets.Value(wide), length=16),
                "feature_map": datasets.Array3D((16, 3, 5), wide),
                "registers": datasets.Array2D((4, 16), wide),
                "layers_-1": datasets.Array3D((16, 3, 5), wide),
                "layers_4": datasets.Array3D((16, 3, 5), wide),
            }
        )
    )
    assert mapped.cache_files, "it is mapped, not in memory"
    for rows in (mapped.with_format("numpy"), streamed.with_format("numpy")):
        check_rows(store, list(rows))
    assert mapped[7]["height"] == 48
    again = FeatureStore(tmp_path / "out").to_datasets(cache_dir=tmp_path / "hf")
    assert again.cache_files == mapped.cache_files, "what is written once is found again"


def check_rows(store: FeatureStore, rows: list[Mapping[str, Any]]) -> None:
    assert tuple(str(row["id"]) for row in rows) == store.ids
    for row, (_, expected) in zip(rows, store.iter_batches(1), strict=True):
        for name, tensor in expected.named():
            assert same_values(row[name.replace(".", "_")], tensor[0].float().numpy()), name


@pytest.mark.slow
def test_to_datasets_in_several_processes(tmp_path: Path) -> None:
    """Threads of torch, which int8 might need, do not survive the forks of either."""
    pytest.importorskip("datasets", minversion="4.3")
    build(tmp_path / "out", FeatureSpec(**OUTPUTS, dtype="int8"), FakeTeacher(hidden_size=256, depth=6))
    store = FeatureStore(tmp_path / "out")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(1000, 1000).mul(2).sum()  # now this process has them
        check_rows(store, list(store.to_datasets(cache_dir=tmp_path / "hf", num_proc=2).with_format("numpy")))
    finally:
        torch.set_num_threads(threads)
    loader = DataLoader(store.to_datasets(streaming=True).with_format("torch"), batch_size=None, num_workers=2)
    assert sorted(row["id"] for row in loader) == sorted(store.ids)


@pytest.mark.slow
def test_to_datasets_in_several_processes_that_a_handler_of_this_one_does_not_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ray.init leaves a handler of SIGTERM, by which datasets ends its processes: a fork that has it may miss that."""
    pytest.importorskip("datasets", minversion="4.3")
    build(tmp_path / "out", FeatureSpec(cls=True), FakeTeacher())
    load = Part.load

    def tell(part: Part, result_dtype: str) -> Mapping[str, Any]:
        handler = signal.getsignal(signal.SIGTERM)
        (tmp_path / f"handler-{os.getpid()}").write_text(str(handler == signal.SIG_DFL))
        return load(part, result_dtype)

    monkeypatch.setattr(Part, "load", tell)
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(number))
    try:
        ours = signal.getsignal(signal.SIGTERM)
        FeatureStore(tmp_path / "out").to_datasets(cache_dir=tmp_path / "hf", num_proc=2)
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)
    told = {path.name: path.read_text() for path in tmp_path.glob("handler-*")}
    assert told
    assert f"handler-{os.getpid()}" not in told
    assert set(told.values()) == {"True"}


def test_to_datasets_of_another_state_of_a_folder_is_not_the_former_one(tmp_path: Path) -> None:
    pytest.importorskip("datasets", minversion="4.3")
    found = []
    for dtype in (torch.float32, torch.bfloat16):  # of which values differ, and nothing else
        build(tmp_path / "out", FeatureSpec(cls=True), FakeTeacher(dtype=dtype))
        store = FeatureStore(tmp_path / "out")
        found.append(store.to_datasets(cache_dir=tmp_path / "hf").with_format("numpy")[0]["cls"])
        assert np.array_equal(found[-1], store[store.ids[0]].cls[0].float().numpy())  # type: ignore[index]
    assert not np.array_equal(*found)


@pytest.mark.slow
def test_to_datasets_says_what_it_cannot_do(tmp_path: Path) -> None:
    pytest.importorskip("datasets", minversion="4.3")
    build(tmp_path, FeatureSpec(cls=True), FakeTeacher())
    store = FeatureStore(tmp_path)
    os.truncate(tmp_path / "parts" / "0000001.parquet", 3_000)
    for options in ({}, {"num_proc": 2}):
        with pytest.raises(StoreError, match=r"0000001.parquet is damaged.*Remedy: delete .*0000001.json"):
            store.to_datasets(cache_dir=tmp_path / "hf", **options)
    with pytest.raises(StoreError, match=r"0000001.parquet is damaged.*Remedy: delete .*0000001.json"):
        list(store.to_datasets(streaming=True))


def test_to_datasets_needs_rows_of_one_shape(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"to_datasets needs rows whose outputs have one shape.*map_size=\(h, w\)"):
        several_shapes(tmp_path / "several").to_datasets()
    folder = Folder.at(tmp_path / "empty")
    folder.make("ledger")
    identity = {"format": FORMAT, "fingerprint": "f", "spec": spec_to_json(FeatureSpec()), "result_dtype": "float32"}
    folder.write_json("plan.json", identity)
    finish(folder, identity)
    for ask in (FeatureStore(tmp_path / "empty").to_datasets, FeatureStore(tmp_path / "empty").to_ray):
        with pytest.raises(
            StoreError, match=r"to_(datasets|ray) needs a store with rows; got FeatureStore\(.*0 images"
        ):
            ask()


@pytest.mark.parametrize("installed", [None, "4.2.0"])
def test_to_datasets_names_what_to_install(
    installed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, FeatureSpec(cls=True), FakeTeacher())
    older = ModuleType("datasets")
    older.__version__ = installed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", older if installed else None)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", older if installed else None)
    message = r"needs Hugging Face's datasets, 4.3 or newer: pip install 'dinov3-ray\[datasets\]' \("
    with pytest.raises(ConfigError, match=message):
        FeatureStore(tmp_path).to_datasets()
