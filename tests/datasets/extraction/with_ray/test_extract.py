"""Extraction with a real Ray over real files: exact rows and errors, whatever is killed on the way."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import deadly
import kills
import numpy as np
import oddteachers
import pyarrow.parquet as pq
import pytest
import ray
import torch
from deadly import Deadly
from kills import assert_equal, finished
from oddteachers import Broken, Changing, Greedy, Nameless, Picky, Sized
from picturefiles import EVERY, damage_of, file_name, write_pictures
from PIL import Image
from pyarrow import fs as pafs
from stores import list_type
from torch import Tensor
from waiting import until

from dinov3_ray.checkpoint import fingerprint
from dinov3_ray.config import DinoV3Config
from dinov3_ray.datasets import FeatureStore, Resources, SourceOptions, StoredTeacher, extract
from dinov3_ray.datasets.decode import Decoder
from dinov3_ray.datasets.extraction import lost_gpus, plan, run
from dinov3_ray.datasets.extraction import probe_process as probing
from dinov3_ray.datasets.extraction.resources import allocate
from dinov3_ray.datasets.folder import Folder
from dinov3_ray.errors import ConfigError, MissingViewError, NumericsError, StoreError
from dinov3_ray.features import FeatureSpec
from dinov3_ray.model import DinoV3Teacher
from dinov3_ray.pool.teacher_pool import TeacherPool
from dinov3_ray.testing import FakeTeacher

# The workers cannot import the tests: what they need of this module travels with the tasks.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
ray.cloudpickle.register_pickle_by_value(deadly)
ray.cloudpickle.register_pickle_by_value(oddteachers)

SPEC = FeatureSpec(cls=True, feature_map=True, layers=(1,), map_size=(2, 2))
GOOD, BROKEN = 490, 10


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, photographs: list[Tensor]) -> Path:
    """scikit-image's photographs and 500 generated files of mixed sizes, 10 of them broken in five ways."""
    root = tmp_path_factory.mktemp("images")
    write_pictures(root, GOOD + BROKEN)
    for index, photograph in enumerate(photographs):
        Image.fromarray(photograph.permute(1, 2, 0).numpy()).save(root / f"photograph-{index}.png")
    return root


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> DinoV3Config:
    return DinoV3Config(tiny_checkpoint, image_size=32, dtype="float32")


@pytest.fixture(scope="module")
def undisturbed(
    images: Path, model: DinoV3Config, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    out = tmp_path_factory.mktemp("stores") / "undisturbed"
    done = extract(images, out, model, SPEC, block_size=100, resources=Resources(threads=1))
    assert done.blocks == len(list((out / "ledger").iterdir())) == 6
    assert done.images == GOOD + BROKEN + 6
    return FeatureStore(out)


def test_exact_rows_and_errors(undisturbed: FeatureStore, images: Path) -> None:
    everything = {str(path.relative_to(images)) for path in images.rglob("*") if path.is_file()}
    errors = {row["id"]: row["kind"] for row in undisturbed.errors.to_pylist()}
    assert len(undisturbed) == GOOD + 6
    assert list(undisturbed.ids) == sorted(everything - errors.keys())
    broken = {file_name(index): damage_of(index) for index in range(0, GOOD + BROKEN, EVERY)}
    assert errors.keys() == broken.keys()
    kinds = {"empty": {"empty"}, "text": {"not an image"}, "bomb": {"too large"}, "cut": {"truncated", "corrupt"}}
    for id_, damage in broken.items():
        assert errors[id_] in kinds.get(str(damage), {"truncated", "corrupt", "not an image"}), (id_, damage)
    manifest = undisturbed.manifest
    assert (manifest["rows"], manifest["errors"]) == (GOOD + 6, BROKEN)
    assert sum(manifest["errors_by_kind"].values()) == BROKEN
    assert "DINOv3 License" in manifest["license"]


def test_features_equal_the_local_teachers_image_by_image(
    undisturbed: FeatureStore, images: Path, model: DinoV3Config
) -> None:
    teacher = DinoV3Teacher(model)
    assert undisturbed.fingerprint == teacher.fingerprint
    # Every row, bit for bit: in the batches that the extraction made of its blocks, on as many threads.
    everything = sorted(str(path.relative_to(images)) for path in images.rglob("*") if path.is_file())
    compared = 0
    for block in (everything[start : start + 100] for start in range(0, len(everything), 100)):
        readable = [id_ for id_ in block if id_ in undisturbed]
        for ids in (readable[start : start + 32] for start in range(0, len(readable), 32)):
            batch = [Decoder().read((images / id_).read_bytes(), id_) for id_ in ids]
            local = teacher.extract(batch, SPEC)
            stored = undisturbed.read(ids)
            for (name, mine), (_, expected) in zip(stored.named(), local.named(), strict=True):
                assert torch.equal(mine, expected), (name, ids)
            assert [undisturbed.original_size(id_) for id_ in ids] == [pixels.shape[1:] for pixels in batch]
            compared += len(ids)
    assert compared == len(undisturbed) == GOOD + 6
    # Alone, a batch of another size, an image may take another kernel: the last bits differ, nothing else.
    id_, pixels = ids[-1], batch[-1]
    alone = teacher.extract(pixels, SPEC)
    for (name, mine), (_, expected) in zip(undisturbed[id_].named(), alone.named(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name} {text}")
    with pytest.raises(MissingViewError):
        StoredTeacher(undisturbed).extract(torch.from_numpy(pixels).flip(-1), SPEC)
    assert torch.equal(StoredTeacher(undisturbed).extract(pixels, SPEC).cls, undisturbed[id_].cls)


def test_parts_are_parquet_with_lists_of_fixed_sizes(undisturbed: FeatureStore) -> None:
    out = Path(undisturbed.folder.path)
    table = pq.read_table(out / "parts" / "0000003.parquet")
    assert table.schema.field("layers_1").type == list_type(np.float32, [128, 2, 2])
    id_ = table["id"][5].as_py()
    assert np.array_equal(np.array(table["cls"][5].as_py(), np.float32), undisturbed.arrays(id_)["cls"])
    metadata = json.loads(table.schema.metadata[b"dinov3_ray"])
    assert metadata["fingerprint"] == undisturbed.fingerprint
    assert metadata["preprocessing"]["size"] == [32, 32]
    assert {"torch", "transformers", "pillow"} <= metadata["versions"].keys()
    assert not list(out.rglob("*.tmp-*"))


@pytest.fixture(scope="module")
def few(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 290 of the images, six of them broken."""
    root = tmp_path_factory.mktemp("few") / "images"
    root.mkdir()
    for path in sorted(images.glob("[0-3]/*")):
        os.link(path, root / path.name)
    return root


@pytest.fixture(scope="module")
def fake_store(few: Path, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    out = tmp_path_factory.mktemp("stores") / "fake"
    extract(few, out, FakeTeacher.factory(), SPEC, block_size=16)
    return FeatureStore(out)


@pytest.mark.slow
def test_killed_at_random_moments_it_is_resumed(
    few: Path, fake_store: FeatureStore, ray_cluster: str, tmp_path: Path
) -> None:
    outcome = kills.disturb(ray_cluster, few, tmp_path, kills=3, delay=0.02)
    print(outcome)
    assert [victim for victim, _ in outcome.kills] == ["driver", "teacher", "decoder"]
    assert outcome.drivers == 2
    assert outcome.recomputed == 0
    assert_equal(FeatureStore(tmp_path / "out"), fake_store)
    again = extract(few, tmp_path / "out", FakeTeacher.factory(), SPEC, block_size=16)
    assert (again.blocks, again.images) == (0, 0)
    assert again.manifest == FeatureStore(tmp_path / "out").manifest


def test_images_that_end_their_process_or_are_refused_fail_alone(few: Path, ray_cluster: str, tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for path in sorted(few.iterdir())[:20]:
        os.link(path, root / path.name)
    system = pafs.PyFileSystem(Deadly())
    extract(root, tmp_path / "out", Picky, SPEC, options=SourceOptions(filesystem=system))
    store = FeatureStore(tmp_path / "out")
    errors = {row["id"]: row for row in store.errors.to_pylist()}
    assert errors.pop("0007.png")["kind"] == "crashed the decoder"
    unforeseen = errors.pop("0014.webp")
    assert (unforeseen["kind"], unforeseen["detail"]) == ("io", "ValueError: nobody foresaw this (3 attempts)")
    assert errors.pop("0000.jpg")["kind"] == "empty"
    smallest = {}
    for path in root.iterdir():
        if path.name not in ("0007.png", "0014.webp", "0000.jpg"):
            with Image.open(path) as image:
                smallest[path.name] = min(image.size)
    assert set(errors) == {name for name, side in smallest.items() if side < 50}
    assert {row["kind"] for row in errors.values()} == {"refused"}
    assert all("at least 50 pixels" in row["detail"] for row in errors.values())
    assert list(store.ids) == sorted(name for name, side in smallest.items() if side >= 50)
    assert len(errors) > 2
    assert len(store) > 2


def test_another_teacher_or_spec_is_refused(few: Path, fake_store: FeatureStore) -> None:
    out = fake_store.folder.path
    with pytest.raises(StoreError, match="fingerprint is 'other', there it is 'fake'"):
        extract(few, out, FakeTeacher.factory(fingerprint="other"), SPEC)
    spec = FeatureSpec(cls=True, feature_map=True, layers=(1, 2), map_size=(2, 2), dtype="float16")
    with pytest.raises(StoreError, match=r"spec.dtype is 'float16', there it is 'native'; spec.layers is \[1, 2\]"):
        extract(few, out, FakeTeacher.factory(), spec)
    with pytest.raises(StoreError, match="block_size is 7, there it is 16"):
        extract(few, out, FakeTeacher.factory(), SPEC, block_size=7, batch_size=7)
    with pytest.raises(StoreError, match=r"source.path is .*, there it is"):
        extract(few.parent, out, FakeTeacher.factory(), SPEC)
    assert FeatureStore(out).manifest == fake_store.manifest


def test_a_store_never_mixes_two_teachers(few: Path, ray_cluster: str, tmp_path: Path) -> None:
    spec = FeatureSpec(cls=True, dtype="float16")  # the stored dtype is the same, whatever the teacher computes in
    extract(few, tmp_path / "dtype", FakeTeacher.factory(dtype=torch.float32), spec)
    with pytest.raises(StoreError, match="computed_in is 'bfloat16', there it is 'float32'"):
        extract(few, tmp_path / "dtype", FakeTeacher.factory(dtype=torch.bfloat16), spec)
    with pytest.raises(StoreError, match="fingerprint is 'after', not 'before'"):
        extract(few, tmp_path / "changing", Changing, SPEC, block_size=16)
    with pytest.raises(NumericsError, match="has values that are not finite"):
        extract(few, tmp_path / "broken", Broken, spec)
    with pytest.raises(StoreError, match="the teacher must have a fingerprint"):
        extract(few, tmp_path / "nameless", Nameless, SPEC)


def test_rows_of_a_dataset_that_share_an_id_are_not_lost_unnoticed(ray_cluster: str, tmp_path: Path) -> None:
    rows = [{"id": str(index % 8), "image": np.full((32, 32, 3), index, np.uint8)} for index in range(16)]
    dataset = ray.data.from_items(rows, override_num_blocks=1)
    before = dataset.context.enable_progress_bars, dataset.context.execution_options.preserve_order
    with pytest.raises(StoreError, match="each with an id of its own; it has 16 and the folder 8"):
        extract(dataset, tmp_path / "out", FakeTeacher.factory(), SPEC, block_size=8)
    after = dataset.context.enable_progress_bars, dataset.context.execution_options.preserve_order
    assert after == before, "the caller's Dataset is as it was"


def test_maps_of_the_images_own_sizes_share_a_store(few: Path, fake_store: FeatureStore, tmp_path: Path) -> None:
    spec = FeatureSpec(feature_map=True)
    extract(few, tmp_path / "out", FakeTeacher.factory(), spec)
    store = FeatureStore(tmp_path / "out")
    assert sorted(store.ids) == list(fake_store.ids)
    for id_ in store.ids[::20]:
        height, width = store.original_size(id_)
        feature_map = store[id_].feature_map
        assert feature_map is not None
        assert feature_map.shape == (1, 16, height // 16, width // 16)
    seen = [id_ for ids, features in store.iter_batches(8) for id_ in ids if len(features) == len(ids)]
    assert tuple(seen) == store.ids


def test_a_teacher_whose_input_follows_the_images_extracts_each_at_its_own_size(
    model: DinoV3Config, ray_cluster: str, tmp_path: Path
) -> None:
    root, out = tmp_path / "images", tmp_path / "out"
    root.mkdir()
    sizes = [(40, 60), (64, 64), (47, 63), (70, 79), (64, 64), (64, 96), (15, 64), (31, 80)]
    generator = np.random.default_rng(0)
    for index, (height, width) in enumerate(sizes):
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(root / f"{index}.png")
    config, spec = replace(model, image_size="input/2"), FeatureSpec(cls=True, feature_map=True)
    done = extract(root, out, config, spec, batch_size=4, resources=Resources(threads=1))
    assert not done.forecast.exact
    store = FeatureStore(out)
    assert (store.manifest["preprocessing"]["follows"], store.manifest["fingerprint"]) == (
        "input/2",
        fingerprint(config),
    )
    errors = {row["id"]: row for row in store.errors.to_pylist()}
    assert errors.keys() == {"6.png", "7.png"}
    assert "at least 32 each way are needed" in errors["7.png"]["detail"]
    # Those that come to one size share a batch.
    teacher = DinoV3Teacher(config)
    for names in (["0.png", "2.png"], ["1.png", "3.png", "4.png"], ["5.png"]):
        batch = [Decoder().read((root / name).read_bytes(), name) for name in names]
        for (name, mine), (_, expected) in zip(
            store.read(names).named(), teacher.extract(batch, spec).named(), strict=True
        ):
            assert torch.equal(mine, expected), (name, names)
        stored = StoredTeacher(store)
        assert torch.equal(stored.extract(batch[0], spec).feature_map, store[names[0]].feature_map)
    with pytest.raises(StoreError, match=r"preprocessing\.follows is 'input', there it is 'input/2'"):
        extract(root, out, replace(model, image_size="input"), spec)


def test_a_ray_dataset_is_extracted_and_resumed(few: Path, fake_store: FeatureStore, tmp_path: Path) -> None:
    paths = sorted(few.iterdir())
    out = tmp_path / "out"
    encoded = ray.data.from_items([{"key": path.name, "image": path.read_bytes()} for path in paths])
    done = extract(encoded, out, FakeTeacher.factory(), SPEC, block_size=32)
    assert done.images == len(paths)
    store = FeatureStore(out)
    assert store.ids == fake_store.ids, "in the Dataset's order"
    for id_ in store.ids[::15]:
        assert torch.equal(store[id_].cls, fake_store[id_].cls)
    # As a kill would leave it: without its end, and without some blocks.
    for name in ("manifest.json", "index.parquet"):
        (out / name).unlink()
    whole = [path for path in sorted((out / "ledger").iterdir()) if not json.loads(path.read_text())["errors"]]
    for entry in whole[:3]:
        entry.unlink()
    before = finished(out)
    # The same pixels, decoded by somebody else; those of finished blocks do not matter.
    readable = set(store.ids)
    pixels = [
        Decoder().read(path.read_bytes(), path.name) if path.name in readable else np.zeros((3, 32, 32), np.uint8)
        for path in paths
    ]
    decoded = ray.data.from_items(
        [{"key": path.name, "image": image} for path, image in zip(paths, pixels, strict=True)]
    )
    resumed = extract(decoded, out, FakeTeacher.factory(), SPEC, block_size=32)
    assert resumed.blocks == 3
    assert finished(out).items() >= before.items()
    assert_equal(FeatureStore(out), store)
    assert FeatureStore(out).ids == store.ids
    other = ray.data.from_items([{"key": "other", "image": b""}])
    with pytest.raises(StoreError, match=r"source.first_ids is \['other'\], there it is \['0000.jpg', "):
        extract(other, out, FakeTeacher.factory(), SPEC)
    longer = ray.data.from_items([{"key": path.name, "image": b""} for path in [*paths, Path("more.jpg")]])
    with pytest.raises(StoreError, match=r"the rows of a Dataset must be those that .* holds"):
        extract(longer, out, FakeTeacher.factory(), SPEC)
    nameless = ray.data.from_items(
        [*[{"key": path.name, "image": b""} for path in paths[:8]], {"key": None, "image": b""}]
    )
    with pytest.raises(
        StoreError, match=r"id_column must name a column with a key in each row; 'key' has a row without"
    ):
        extract(nameless, tmp_path / "nameless", FakeTeacher.factory(), SPEC)
    texts = ray.data.from_items([{"key": path.name, "image": str(path)} for path in paths])
    with pytest.raises(StoreError, match=r"image_column must hold encoded bytes or pixels; 'image' holds str"):
        extract(texts, out, FakeTeacher.factory(), SPEC)
    with pytest.raises(StoreError, match="image_column must name a column of the Dataset; got 'jpg'"):
        extract(other, out, FakeTeacher.factory(), SPEC, options=SourceOptions(image_column="jpg"))


def sized(store: FeatureStore, id_: str) -> float:
    """The size of the batch in which the teacher :class:`Sized` saw an image."""
    features = store[id_].cls
    assert features is not None
    return float(features[0, 0])


def test_a_resumed_run_does_not_list_its_source_again_and_may_have_another_batch_size(
    few: Path, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root, out = tmp_path / "images", tmp_path / "out"
    root.mkdir()
    for path in sorted(few.iterdir())[:40]:
        os.link(path, root / path.name)
    monkeypatch.setattr(probing, "_PATIENCE_SECONDS", 0.0)
    with caplog.at_level(logging.WARNING):
        done = extract(root, out, Sized, SPEC, block_size=16)
    assert "the first teacher is not ready after 0 s: it needs 0 GPU" in caplog.text
    root.rename(tmp_path / "gone")
    assert extract(root, out, Sized, SPEC, batch_size=5).manifest == done.manifest
    store = FeatureStore(out)
    (out / "manifest.json").unlink()
    (out / "ledger" / "0000001.json").unlink()
    with pytest.raises(StoreError, match="None of the next 16 files is there"):
        extract(root, out, Sized, SPEC)
    (tmp_path / "gone").rename(root)
    (root / "came later.jpg").write_bytes(b"")
    # As after running out of memory: what is left in batches of one, what is finished as it was.
    resumed = extract(root, out, Sized, SPEC, batch_size=1)
    assert resumed.blocks == 1
    assert "2 parts were made with batch size 32; what remains is made with 1. Features" in str(resumed.forecast)
    assert resumed.manifest is not None
    assert resumed.manifest["batch_sizes"] == {"1": 1, "32": 2}
    mixed = FeatureStore(out)
    assert mixed.ids == store.ids
    sizes = [sized(mixed, id_) for id_ in mixed.ids]
    assert max(sizes) > 1
    # The blocks' rows in order: 16 images each but for those that could not be read.
    (first, second, _) = (entry["rows"] for entry in mixed.manifest["blocks"])
    assert set(sizes[first : first + second]) == {1.0}
    assert sizes[:first] == [sized(store, id_) for id_ in store.ids[:first]]
    assert json.loads((out / "plan.json").read_text())["batch_size"] == 1, "that of the next resumption"
    (out / "plan.json").rename(out / "elsewhere.json")
    with pytest.raises(StoreError, match=r"holds features, but no plan\.json that says whose"):
        extract(root, out, FakeTeacher.factory(fingerprint="other"), SPEC)
    monkeypatch.setattr(probing, "_LIMIT_SECONDS", 0.0)
    with pytest.raises(StoreError, match="a teacher must be ready within 0 s: it needs 0 GPU"):
        extract(root, tmp_path / "other", FakeTeacher.factory(), SPEC)


def test_a_batch_that_ends_each_process_is_told_with_the_remedy_which_helps(
    few: Path, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for path in sorted(few.iterdir())[1:4]:
        os.link(path, root / path.name)
    monkeypatch.setattr(run, "_ATTEMPTS", 1)
    with pytest.raises(StoreError, match=r"block 0000000 must be finished by one of 1 processes; .*smaller batch_size"):
        extract(root, tmp_path / "out", Greedy, SPEC)
    assert extract(root, tmp_path / "out", Greedy, SPEC, batch_size=1).images == 3
    assert FeatureStore(tmp_path / "out").manifest["batch_sizes"] == {"1": 1}


def test_through_a_pool_that_is_running(few: Path, fake_store: FeatureStore, tmp_path: Path) -> None:
    # Its replica reserves all CPUs that Ray has: decoding goes on beside it, and does not wait for one to be free.
    with TeacherPool.start(FakeTeacher.factory(), name="extracting", replicas=1, num_cpus=4, namespace="apart") as pool:
        extract(few, tmp_path / "out", None, SPEC, pool=pool.teacher(), block_size=16)
    assert_equal(FeatureStore(tmp_path / "out"), fake_store)


def test_the_forecast_comes_first_and_a_full_disk_is_refused(
    few: Path, tmp_path: Path, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = FeatureSpec(feature_map=True, map_size=(64, 64), dtype="int8")
    forecasts = []
    done = extract(few, tmp_path / "out", FakeTeacher.factory(), spec, dry_run=True, on_forecast=forecasts.append)
    assert forecasts == [done.forecast]
    count = len(list(few.iterdir()))
    assert (done.forecast.images, done.forecast.remaining) == (count, count)
    assert done.forecast.row_bytes == 1.25 * 16 * 64 * 64 + 4.25 * 64 * 64 + 64  # values, where lists begin, scales
    assert done.forecast.fits
    assert f"{count} images, 99.4 kB each" in str(done.forecast)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(plan, "free_bytes", lambda folder: 20_000_000)  # a disk that is nearly full
    with pytest.raises(StoreError, match=r"out must have room for the features: .*; 20\.0 MB free on the disk"):
        extract(few, tmp_path / "out", FakeTeacher.factory(), spec)
    assert not (tmp_path / "out" / "plan.json").exists()


def test_two_runs_into_one_folder_are_refused(few: Path, tmp_path: Path, ray_cluster: str) -> None:
    with (
        Folder.at(tmp_path / "out").exclusive(),
        pytest.raises(StoreError, match="is being written by another run"),
    ):
        extract(few, tmp_path / "out", FakeTeacher.factory(), SPEC)


def test_gpus_that_are_lost_are_told_once(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_gpus = allocate({"GPU": 2, "CPU": 8}, 2)
    assert lost_gpus.lost(on_gpus, {"GPU": 2.0}) is None
    assert lost_gpus.lost(allocate({"CPU": 8}, 2), {"CPU": 4.0}) is None
    said = lost_gpus.lost(on_gpus, {"GPU": 1.0, "CPU": 4.0})
    assert said is not None
    assert "has 1 of the 2 GPUs that the teachers began with" in said
    monkeypatch.setattr(lost_gpus, "_WATCH_SECONDS", 0.02)
    with caplog.at_level(logging.WARNING), lost_gpus.watching(on_gpus):  # the tests' Ray has none
        until(lambda: "has 0 of the 2 GPUs" in caplog.text, "the loss is told")
        time.sleep(0.2)
    assert len(caplog.records) == 1


def test_options_that_contradict_each_other(few: Path, tmp_path: Path, ray_cluster: str) -> None:
    with pytest.raises(ConfigError, match="exactly one of config and pool"):
        extract(few, tmp_path / "out")
    with pytest.raises(ConfigError, match="batch_size must be an integer, at least 1; got 0"):
        extract(few, tmp_path / "out", FakeTeacher.factory(), batch_size=0)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"out must be a folder that can be written, or made; got .*file"):
        extract(few, tmp_path / "file", FakeTeacher.factory())
    with pytest.raises(ConfigError, match="must fit the cluster's 0 GPUs; got 2 x 1"):
        extract(few, tmp_path / "out", FakeTeacher.factory(), resources=Resources(replicas=2, num_gpus=1))
