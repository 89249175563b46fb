"""Extraction with a real Ray over real files: exact rows and errors, whatever is killed on the way."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import deadly
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from deadly import Deadly
from PIL import Image
from pyarrow import fs as pafs
from torch import Tensor

from dinov3_ray.config import DinoV3Config
from dinov3_ray.datasets import FeatureStore, StoredTeacher, extract, plan
from dinov3_ray.datasets.decode import Decoder
from dinov3_ray.datasets.layout import Folder
from dinov3_ray.errors import ConfigError, MissingViewError, StoreError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.model import DinoV3Teacher
from dinov3_ray.pool.teacher_pool import TeacherPool
from dinov3_ray.testing import FakeTeacher

# The workers cannot import the tests: what they need of this module travels with the tasks.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
ray.cloudpickle.register_pickle_by_value(deadly)

SPEC = FeatureSpec(cls=True, feature_map=True, layers=(1,), map_size=(2, 2))
GOOD, BROKEN = 1960, 40
FORMS = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))


def image_bytes(index: int, form: str) -> bytes:
    generator = np.random.default_rng(index)
    height, width = generator.integers(32, 97, 2)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((int(width), int(height)), Image.Resampling.BILINEAR).save(file, form)
    return file.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, photographs: list[Tensor]) -> Path:
    """scikit-image's photographs and 2,000 generated files of mixed sizes, 40 of them broken in five ways."""
    root = tmp_path_factory.mktemp("images")
    for index in range(GOOD + BROKEN):
        extension, form = FORMS[index % 3]
        path = root / f"{index % 7}" / f"{index:04}.{extension}"
        path.parent.mkdir(exist_ok=True)
        data = image_bytes(index, form)
        if index % 50 == 0:
            bomb = io.BytesIO()
            Image.new("1", (20_000, 10_000)).save(bomb, "PNG")
            data = (b"", data[: len(data) // 2], b"a text", bomb.getvalue(), image_bytes(0, "PNG")[:20])[
                index // 50 % 5
            ]
        path.write_bytes(data)
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
    done = extract(images, out, model, SPEC, block_size=100, threads=1)
    assert done.blocks == len(list((out / "ledger").iterdir())) == 21
    assert done.images == GOOD + BROKEN + 6
    return FeatureStore(out)


def assert_equal(store: FeatureStore, expected: FeatureStore) -> None:
    """Row for row, bit for bit, errors included."""
    assert store.ids == expected.ids
    assert store.errors.equals(expected.errors)
    for id_ in expected.ids:
        mine, other = store.arrays(id_), expected.arrays(id_)
        assert mine.keys() == other.keys()
        assert all(np.array_equal(mine[name], other[name]) for name in other), id_
        assert store.view(id_) == expected.view(id_)
        assert store.original_size(id_) == expected.original_size(id_)


def test_exact_rows_and_errors(undisturbed: FeatureStore, images: Path) -> None:
    everything = {str(path.relative_to(images)) for path in images.rglob("*") if path.is_file()}
    errors = {row["id"]: row["kind"] for row in undisturbed.errors.to_pylist()}
    assert len(undisturbed) == GOOD + 6
    assert list(undisturbed.ids) == sorted(everything - errors.keys())
    kinds = {}
    for index in range(0, GOOD + BROKEN, 50):
        kinds[f"{index % 7}/{index:04}.{FORMS[index % 3][0]}"] = index // 50 % 5
    assert errors.keys() == kinds.keys()
    expected = {0: {"empty"}, 2: {"not an image"}, 3: {"too large"}, 1: {"truncated", "corrupt"}}
    for id_, kind in kinds.items():
        assert errors[id_] in expected.get(kind, {"truncated", "corrupt", "not an image"}), (id_, kind)
    manifest = undisturbed.manifest
    assert (manifest["rows"], manifest["errors"]) == (GOOD + 6, BROKEN)
    assert sum(manifest["errors_by_kind"].values()) == BROKEN


def test_features_equal_the_local_teachers_image_by_image(
    undisturbed: FeatureStore, images: Path, model: DinoV3Config
) -> None:
    teacher = DinoV3Teacher(model)
    assert undisturbed.fingerprint == teacher.fingerprint
    for id_ in [*undisturbed.ids[::10], *undisturbed.ids[-6:]]:
        pixels = Decoder().read((images / id_).read_bytes(), id_)
        local = teacher.extract(pixels, SPEC)
        for (name, stored), (_, expected) in zip(undisturbed[id_].named(), local.named(), strict=True):
            assert stored.shape == expected.shape
            # A batch of another size may take another kernel: the last bits differ, nothing else.
            torch.testing.assert_close(
                stored, expected, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name} {text}"
            )
        assert undisturbed.original_size(id_) == pixels.shape[1:]
    with pytest.raises(MissingViewError):
        StoredTeacher(undisturbed).extract(torch.from_numpy(pixels).flip(-1), SPEC)
    assert torch.equal(StoredTeacher(undisturbed).extract(pixels, SPEC).cls, undisturbed[id_].cls)


def test_parts_are_parquet_with_canonical_tensors(undisturbed: FeatureStore) -> None:
    out = Path(undisturbed._folder.path)
    table = pq.read_table(out / "parts" / "0000003.parquet")
    assert table.schema.field("layers.1").type == pa.fixed_shape_tensor(pa.float32(), [128, 2, 2])
    id_ = table["id"][5].as_py()
    assert np.array_equal(table["cls"].combine_chunks().to_numpy_ndarray()[5], undisturbed.arrays(id_)["cls"])
    metadata = json.loads(table.schema.metadata[b"dinov3_ray"])
    assert metadata["fingerprint"] == undisturbed.fingerprint
    assert metadata["preprocessing"]["size"] == [32, 32]
    assert {"torch", "transformers", "pillow"} <= metadata["versions"].keys()
    assert not list(out.rglob("*.tmp-*"))


_DRIVER = """
import sys
from dinov3_ray.config import DinoV3Config
from dinov3_ray.datasets import extract
from dinov3_ray.features import FeatureSpec
spec = FeatureSpec(cls=True, feature_map=True, layers=(1,), map_size=(2, 2))
model = DinoV3Config(sys.argv[3], image_size=32, dtype="float32")
done = extract(sys.argv[1], sys.argv[2], model, spec, block_size=100, address=sys.argv[4], threads=1)
print(done.blocks)
"""


def finished(out: Path) -> dict[str, int]:
    """Blocks in the ledger, with the inode of each entry: a block that is computed again has another."""
    return {path.name: path.stat().st_ino for path in (out / "ledger").glob("*.json")} if out.exists() else {}


def wait_for(condition: Callable[[], bool], running: Callable[[], bool], seconds: float = 90) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        if not running():
            return False
        time.sleep(0.005)
    return True


@pytest.mark.slow
def test_a_killed_driver_is_resumed_by_the_same_command(
    undisturbed: FeatureStore, images: Path, model: DinoV3Config, ray_cluster: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", _DRIVER, str(images), str(out), str(model.root), ray_cluster]
    generator = np.random.default_rng(5)
    for _ in range(2):
        before = finished(out)
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        more = len(before) + int(generator.integers(1, 7))
        assert wait_for(lambda more=more: len(finished(out)) >= more, lambda driver=driver: driver.poll() is None)
        driver.send_signal(signal.SIGKILL)
        driver.wait(30)
        # The driver's workers may finish what they are at before they notice.
        assert finished(out).items() >= before.items()
    with pytest.raises(StoreError, match="is not finished: run the same command again"):
        FeatureStore(out)
    partial = FeatureStore(out, partial=True)
    assert 0 < len(partial) < len(undisturbed)
    for id_ in partial.ids[:5]:
        assert torch.equal(partial[id_].cls, undisturbed[id_].cls)
    before = finished(out)
    done = extract(images, out, model, SPEC, threads=1)
    assert done.blocks <= 21 - len(before)
    assert finished(out).items() >= before.items()
    assert_equal(FeatureStore(out), undisturbed)
    again = extract(images, out, model, SPEC)
    assert (again.blocks, again.images, again.manifest) == (0, 0, done.manifest)


class Traced(FakeTeacher):
    """Leaves its process's id in a folder, and takes its time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(delay=0.01)
        (folder / str(os.getpid())).touch()


class TracedFactory:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> FakeTeacher:
        return Traced(self.folder)


@pytest.fixture(scope="module")
def few(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 290 of the images, three of them broken."""
    root = tmp_path_factory.mktemp("few") / "images"
    root.mkdir()
    for path in sorted((images / "0").iterdir()):
        os.link(path, root / path.name)
    return root


@pytest.fixture(scope="module")
def fake_store(few: Path, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    out = tmp_path_factory.mktemp("stores") / "fake"
    extract(few, out, FakeTeacher.factory(), SPEC, block_size=16)
    return FeatureStore(out)


def test_a_killed_actor_costs_nothing_but_time(few: Path, fake_store: FeatureStore, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    out = tmp_path / "out"
    failures: list[BaseException] = []

    def run() -> None:
        try:
            extract(few, out, TracedFactory(pids), SPEC, block_size=16)
        except BaseException as error:
            failures.append(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    # The first process made the probe; it may be the actor's too.
    for blocks in (2, 7):
        assert wait_for(lambda blocks=blocks: len(finished(out)) >= blocks, thread.is_alive)
        newest = max(pids.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.kill(int(newest.name), signal.SIGKILL)
    thread.join(90)
    assert not failures
    assert len(list(pids.iterdir())) >= 3
    assert_equal(FeatureStore(out), fake_store)


def test_an_image_that_ends_its_process_fails_alone(few: Path, fake_store: FeatureStore, tmp_path: Path) -> None:
    done = extract(
        few, tmp_path / "out", FakeTeacher.factory(), SPEC, block_size=16, filesystem=pafs.PyFileSystem(Deadly())
    )
    store = FeatureStore(tmp_path / "out")
    kinds = {row["id"]: row["kind"] for row in store.errors.to_pylist()}
    assert kinds.pop("0007.png") == "crashed the decoder"
    assert kinds == {row["id"]: row["kind"] for row in fake_store.errors.to_pylist()}
    assert store.ids == tuple(id_ for id_ in fake_store.ids if id_ != "0007.png")
    assert done.manifest is not None


def test_another_teacher_or_spec_is_refused(few: Path, fake_store: FeatureStore) -> None:
    out = fake_store._folder.path
    with pytest.raises(StoreError, match="fingerprint is 'other', there it is 'fake'"):
        extract(few, out, FakeTeacher.factory(fingerprint="other"), SPEC)
    spec = FeatureSpec(cls=True, feature_map=True, layers=(1, 2), map_size=(2, 2), dtype="float16")
    with pytest.raises(StoreError, match=r"spec.dtype is 'float16', there it is 'native'; spec.layers is \[1, 2\]"):
        extract(few, out, FakeTeacher.factory(), spec)
    with pytest.raises(StoreError, match="batch_size is 7, there it is 32"):
        extract(few, out, FakeTeacher.factory(), SPEC, batch_size=7)
    with pytest.raises(StoreError, match=r"source.path is .*, there it is"):
        extract(few.parent, out, FakeTeacher.factory(), SPEC)
    assert FeatureStore(out).manifest == fake_store.manifest


class Spy:
    """Fails each image of fewer than 50 rows, and counts on."""

    fingerprint = "spy"

    def extract(self, images: Tensor, spec: FeatureSpec) -> Features:
        return FakeTeacher(patch_size=50).extract(images, spec)


def test_an_image_that_the_teacher_refuses_fails_alone(few: Path, fake_store: FeatureStore, tmp_path: Path) -> None:
    extract(few, tmp_path / "out", Spy, SPEC)
    store = FeatureStore(tmp_path / "out")
    large = [id_ for id_ in fake_store.ids if min(fake_store.original_size(id_)) >= 50]
    assert 0 < len(large) < len(fake_store)
    assert list(store.ids) == large
    refused = [row for row in store.errors.to_pylist() if row["kind"] == "refused"]
    assert len(refused) == len(fake_store) - len(large)
    assert "at least 50 pixels" in refused[0]["detail"]


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


def test_a_ray_dataset_is_extracted_and_resumed(few: Path, fake_store: FeatureStore, tmp_path: Path) -> None:
    rows = [{"key": path.name, "image": path.read_bytes()} for path in sorted(few.iterdir())]
    out = tmp_path / "out"
    dataset = ray.data.from_items(rows)
    done = extract(dataset, out, FakeTeacher.factory(), SPEC, block_size=32)
    assert done.images == len(rows)
    store = FeatureStore(out)
    assert sorted(store.ids) == list(fake_store.ids)
    for id_ in store.ids[::15]:
        assert torch.equal(store[id_].cls, fake_store[id_].cls)
    # As a kill would leave it: without its end, and without some blocks.
    for name in ("manifest.json", "index.parquet"):
        (out / name).unlink()
    for entry in sorted((out / "ledger").iterdir())[:3]:
        entry.unlink()
    before = finished(out)
    resumed = extract(dataset, out, FakeTeacher.factory(), SPEC, block_size=32)
    assert resumed.blocks == 3
    assert finished(out).items() >= before.items()
    assert_equal(FeatureStore(out), store)


def test_through_a_pool_that_is_running(few: Path, fake_store: FeatureStore, tmp_path: Path) -> None:
    with TeacherPool.start(FakeTeacher.factory(), name="extracting", replicas=1, num_cpus=0.5):
        extract(few, tmp_path / "out", None, SPEC, pool="extracting", block_size=16)
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
    assert done.forecast.row_bytes == 16 * 64 * 64 + 4 * 64 * 64 + 64
    assert done.forecast.fits
    assert f"{count} images, 82.0 kB each" in str(done.forecast)
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


def test_options_that_contradict_each_other(few: Path, tmp_path: Path, ray_cluster: str) -> None:
    with pytest.raises(ConfigError, match="exactly one of config and pool"):
        extract(few, tmp_path / "out")
    with pytest.raises(ConfigError, match="batch_size must be at least 1; got 0"):
        extract(few, tmp_path / "out", FakeTeacher.factory(), batch_size=0)
    with pytest.raises(ConfigError, match="must fit the cluster's 0 GPUs; got 2 x 1"):
        extract(few, tmp_path / "out", FakeTeacher.factory(), replicas=2, num_gpus=1)
