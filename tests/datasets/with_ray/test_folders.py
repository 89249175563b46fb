"""Extraction of what people have: folders where little can be read, plug-ins, mixed arrays, sources that move."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import ray
from file_changes import change_json
from PIL import Image, PngImagePlugin

from dinov3_ray.datasets import FeatureStore, SourceOptions, TargetDataset, extract
from dinov3_ray.datasets.decode import Decoder
from dinov3_ray.errors import ConfigError, StoreError
from dinov3_ray.features import FeatureSpec
from dinov3_ray.testing import FakeTeacher

# The workers cannot import the tests: what they need of this module travels with the tasks.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

SPEC = FeatureSpec(cls=True)


def pixels(index: int, side: int = 40) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(index: int, side: int = 40) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(index, side)).save(file, "PNG")
    return file.getvalue()


def folder_of(root: Path, good: int, bad: int) -> Path:
    root.mkdir()
    for index in range(good + bad):
        (root / f"{index:02}.png").write_bytes(png(index) if index < good else b"no picture")
    return root


def test_a_run_without_one_readable_image_is_an_error(ray_cluster: str, tmp_path: Path) -> None:
    root = folder_of(tmp_path / "images", 0, 3)
    words = r"no image was read; 3 of 3 are errors \(3 not an image\), such as '00\.png': .*errors\.parquet lists all"
    for _ in range(2):  # the finished store says so again
        with pytest.raises(StoreError, match=words):
            extract(root, tmp_path / "out", FakeTeacher.factory(), SPEC)
    assert len(FeatureStore(tmp_path / "out").errors) == 3
    # As older versions finished the store of a source without rows.
    change_json(tmp_path / "out" / "manifest.json", errors=0)
    with pytest.raises(StoreError, match=r"source must hold images; .*out has neither rows nor errors"):
        extract(root, tmp_path / "out", FakeTeacher.factory(), SPEC)


def test_more_than_a_share_of_errors_is_an_error(ray_cluster: str, tmp_path: Path) -> None:
    root = folder_of(tmp_path / "images", 6, 2)
    assert extract(root, tmp_path / "any", FakeTeacher.factory(), SPEC).manifest is not None
    assert extract(root, tmp_path / "quarter", FakeTeacher.factory(), SPEC, max_errors=0.25).manifest is not None
    with pytest.raises(StoreError, match=r"at most 24.00% of the images may be errors \(max_errors\); 2 of 8 are"):
        extract(root, tmp_path / "fewer", FakeTeacher.factory(), SPEC, max_errors=0.24)
    with pytest.raises(StoreError, match=r"at most 10.00% .*; 2 of 8 are errors \(2 not an image\), such as '06\.png'"):
        extract(root, tmp_path / "any", FakeTeacher.factory(), SPEC, max_errors=0.1)
    with pytest.raises(ConfigError, match=r"max_errors must be a share, 0 to 1, or None; got 5"):
        extract(root, tmp_path / "out", FakeTeacher.factory(), SPEC, max_errors=5)


def test_a_bug_in_a_decoding_task_ends_the_run(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Misspelt(Decoder):
        def decode(self, data: bytes | memoryview) -> NoReturn:
            raise AttributeError("no attribute 'misspelt'")

    monkeypatch.setattr(SourceOptions, "decoder", lambda _: Misspelt())
    root = folder_of(tmp_path / "images", 2, 0)
    with pytest.raises(AttributeError, match="misspelt"):
        extract(root, tmp_path / "out", FakeTeacher.factory(), SPEC)
    assert not (tmp_path / "out" / "ledger").exists()


class Backwards(PngImagePlugin.PngImageFile):
    """A format that no Pillow has: the bytes of a PNG file from the last to the first."""

    format = "BACKWARDS"

    def __init__(self, fp: io.BytesIO, filename: str = "") -> None:
        super().__init__(io.BytesIO(fp.read()[::-1]), filename)


def is_backwards(prefix: bytes) -> bool:
    return prefix[:8] == b"IEND\xaeB\x60\x82"[::-1]


def test_a_plugin_that_the_caller_registered_reads_in_the_workers(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder_of(tmp_path / "images", 2, 0)
    (root / "02.bwd").write_bytes(png(2)[::-1])
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    Image.register_open("BACKWARDS", Backwards, is_backwards)
    Image.register_extension("BACKWARDS", ".bwd")
    extract(root, tmp_path / "out", FakeTeacher.factory(), SPEC)
    store = FeatureStore(tmp_path / "out")
    assert list(store.ids) == ["00.png", "01.png", "02.bwd"]
    assert store.manifest["decoding"]["plugins"] == ["BACKWARDS"]


def test_arrays_of_all_kinds_share_a_column(ray_cluster: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rgb = pixels(0)
    alpha = np.full((*rgb.shape[:2], 1), 255, np.uint8)
    arrays = [
        rgb,
        np.dstack([rgb, alpha]),
        rgb[:, :39].astype(np.uint16) * 257,
        np.float32(rgb[:30] / 255),
        rgb[..., 0],
    ]
    arrays.append(np.dstack([rgb[..., :1], alpha]))
    rows = [{"id": str(index), "image": array} for index, array in enumerate(arrays)]
    arrays += [rgb.astype(np.uint16) * 257, rgb[..., 0] > 100, rgb / 255, rgb.astype(np.int64)]
    rows = [{"id": str(index), "image": array} for index, array in enumerate(arrays)]
    rows += [{"id": "null", "image": None}, {"id": "bytes", "image": png(0)}]
    rows += [{"id": "named", "image": {"bytes": png(0), "path": "0.png"}}]
    with caplog.at_level(logging.WARNING, "dinov3_ray"):
        # A block for each row; the worker's batches are of several.
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        extract(dataset, tmp_path / "out", FakeTeacher.factory(), SPEC, block_size=5, batch_size=5)
    assert "arrays [H,W] of column 'image' are taken as grey" in caplog.text
    store = FeatureStore(tmp_path / "out")
    assert [(error["id"], error["kind"]) for error in store.errors.to_pylist()] == [("null", "missing")]
    assert store.ids == tuple(row["id"] for row in rows if row["id"] != "null"), "in the Dataset's order"
    for same in ("1", "6", "8", "9", "bytes", "named"):
        assert store.view("0") == store.view(same), same
    assert store.view("4") == store.view("5")


def test_nulls_among_arrays_and_ids_of_two_types_share_a_block(ray_cluster: str, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"id": index, "image": pixels(index)} for index in range(3)]
    rows[1:1] = [{"id": "null", "image": None}]
    for blocks in (len(rows), 2, 1):
        # Ids of two types share a Dataset, not a block, which is Ray Data's own matter.
        some = [{**row, "id": str(row["id"])} for row in rows] if blocks < len(rows) else rows
        extract(
            ray.data.from_items(some, override_num_blocks=blocks), tmp_path / str(blocks), FakeTeacher.factory(), SPEC
        )
        store = FeatureStore(tmp_path / str(blocks))
        assert store.ids == ("0", "1", "2")
        assert store.errors["id"].to_pylist() == ["null"]


def test_what_ray_data_widens_or_cannot_join_is_told(ray_cluster: str, tmp_path: Path) -> None:
    # In a block of its own making, Ray Data widens arrays of one shape and several dtypes: what they were is lost.
    rgb = pixels(0)
    wide = {"id": "wide", "image": rgb.astype(np.uint16) * 257}
    for name, image, other in (("8 bits", rgb, wide["image"]), ("bool", rgb[..., 0] > 100, rgb[..., 1])):
        rows = [{"id": name, "image": image}, {"id": "other", "image": other}]
        extract(ray.data.from_items(rows, override_num_blocks=1), tmp_path / name, FakeTeacher.factory(), SPEC)
        (error,) = FeatureStore(tmp_path / name).errors.to_pylist()
        assert (error["id"], error["kind"]) == (name, "unsupported")
    joined = ray.data.from_items([{"id": "8 bits", "image": rgb}, wide], override_num_blocks=2).map_batches(
        lambda batch: batch, batch_size=2
    )
    with pytest.raises(
        StoreError, match=r"(?s)column 'image' has more: .*uint8.*uint16.*Remedy: .* bring all to uint8"
    ):
        extract(joined, tmp_path / "joined", FakeTeacher.factory(), SPEC, options=SourceOptions(image_column="image"))


def test_a_source_that_has_moved_goes_on_where_it_lies_now(ray_cluster: str, tmp_path: Path) -> None:
    root, out = folder_of(tmp_path / "images", 8, 0), tmp_path / "out"
    extract(root, out, FakeTeacher.factory(), SPEC, block_size=4, batch_size=4)
    before = {path.name: path.read_bytes() for path in (out / "parts").iterdir()}
    for name in ("manifest.json", "index.parquet", "errors.parquet", "ledger/0000001.json"):
        (out / name).unlink()
    now = root.rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"source.path is '.*elsewhere', there it is .*--source-moved goes on"):
        extract(now, out, FakeTeacher.factory(), SPEC)
    done = extract(now, out, FakeTeacher.factory(), SPEC, source_moved=True)
    assert done.blocks == 1
    assert json.loads((out / "plan.json").read_text())["source"]["root"] == str(now)
    store = FeatureStore(out)
    assert store.manifest["source"]["path"] == str(now)
    assert len(store) == 8
    first = next(name for name in sorted(before))
    assert (out / "parts" / first).read_bytes() == before[first], "what was finished stays"
    assert len(TargetDataset(store)) == 8
    assert np.array_equal(TargetDataset(store)[7][0], pixels(7).transpose(2, 0, 1))
    assert extract(now, out, FakeTeacher.factory(), SPEC).manifest == done.manifest, "from now on, it lies there"
    # A finished store learns it, too, if the files are there.
    third = now.rename(tmp_path / "third")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"must still hold the images .* None of the next 4 files is there, such as"):
        extract(tmp_path / "empty", out, FakeTeacher.factory(), SPEC, source_moved=True)
    extract(third, out, FakeTeacher.factory(), SPEC, source_moved=True, dry_run=True)
    assert FeatureStore(out).manifest == done.manifest
    told = extract(third, out, FakeTeacher.factory(), SPEC, source_moved=True)
    store = FeatureStore(out)
    assert told.manifest == store.manifest == {**done.manifest, "source": store.manifest["source"]}  # type: ignore[dict-item]
    assert (
        store.manifest["source"]["root"] == json.loads((out / "plan.json").read_text())["source"]["root"] == str(third)
    )
    assert np.array_equal(TargetDataset(store)[7][0], pixels(7).transpose(2, 0, 1))
    with pytest.raises(ConfigError, match="source_moved must be left out where source is a Ray Dataset"):
        extract(ray.data.range(1), tmp_path / "other", FakeTeacher.factory(), SPEC, source_moved=True)


def test_images_that_are_shrunk_are_told_in_the_manifest_and_found_again(ray_cluster: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels(0, 400)).save(tmp_path / "images" / "0.jpg")
    options = SourceOptions(shrink_to=100)
    extract(tmp_path / "images", tmp_path / "out", FakeTeacher.factory(), SPEC, options=options)
    store = FeatureStore(tmp_path / "out")
    assert store.manifest["decoding"]["shrink_to"] == 100
    assert store.manifest["versions"].keys() >= {"pillow", "libjpeg-turbo"}
    assert store.original_size("0.jpg") == (100, 100)
    assert TargetDataset(store)[0][0].shape == (3, 100, 100)
    with pytest.raises(StoreError, match=r"decoding\.shrink_to is None, there it is 100"):
        extract(tmp_path / "images", tmp_path / "out", FakeTeacher.factory(), SPEC)
