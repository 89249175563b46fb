"""Exports: other tools read from them what the store holds; they are whole, or not there, whatever happens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import export_kills
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from export_readers import READERS, assert_rows, expected, rows_of_lance, rows_of_npy, tree
from file_changes import change_json
from resident import resident
from stores import COUNT, SPEC, build, fill

from dinov3_ray.datasets import FeatureStore, export
from dinov3_ray.datasets.exports import export as exporting
from dinov3_ray.datasets.folder import Folder
from dinov3_ray.errors import ConfigError, DinoV3Error, NumericsError, StoreError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.testing import FakeTeacher

FORMATS = ("npy", "webdataset", "lance")


@pytest.fixture(params=FORMATS)
def to(request: pytest.FixtureRequest) -> Any:
    if request.param == "lance":
        pytest.importorskip("lance")
    return request.param


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """50 images in three blocks, five outputs each, and one error."""
    out = tmp_path_factory.mktemp("stores") / "out"
    build(out, SPEC, FakeTeacher())
    return FeatureStore(out)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Twelve images; the maps of every third one are of another shape."""
    blocks = []
    for index in range(12):
        side = 5 if index % 3 == 1 else 4
        features = Features(torch.full((1, 8), float(index)), torch.full((1, 8, 4, side), float(index)))
        blocks.append(([f"{index}.jpg"], features))
    return fill(tmp_path_factory.mktemp("stores") / "mixed", FeatureSpec(cls=True, feature_map=True), blocks)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["native", "float16", "int8"])
def test_readers_find_what_the_store_gives(dtype: Any, compute: torch.dtype, to: Any, tmp_path: Path) -> None:
    spec = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(-1, 0), dtype=dtype)
    build(tmp_path / "out", spec, FakeTeacher(dtype=compute))
    store = FeatureStore(tmp_path / "out")
    done = export(store, to, shard_size=16)
    assert done.path == tmp_path / f"out.{to}"
    assert (done.images, done.manifest["rows"], done.manifest["complete"]) == (COUNT, COUNT, True)
    assert_rows(READERS[to](done.path), expected(store))
    said = json.loads((done.path / "export.json").read_text())
    assert said == done.manifest
    assert (said["store"]["fingerprint"], said["store"]["spec"]["dtype"]) == ("fake", dtype)
    # The image that could not be read has no row, and is not forgotten.
    assert pq.read_table(done.path / "errors.parquet").to_pylist() == store.errors.to_pylist()
    assert store.errors["id"].to_pylist() == ["bad.jpg"]
    assert not (tmp_path / f"out.{to}.partial").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("stored", ["native", "float16", "int8"])
def test_other_dtypes_are_those_of_the_teacher(stored: Any, dtype: Any, tmp_path: Path) -> None:
    """As FeatureSpec has them, of the values that the store gives."""
    spec = FeatureSpec(cls=True, feature_map=True, dtype=stored)
    build(tmp_path / "out", spec, FakeTeacher())
    store = FeatureStore(tmp_path / "out")
    found = rows_of_npy(export(store, "npy", dtype=dtype).path)
    if dtype == stored == "int8":
        assert_rows(found, expected(store, stored=True))
        return
    for id_ in store.ids[::7]:
        for name, tensor in store[id_].named():
            values = found[id_][name]
            assert values.dtype == np.dtype(dtype)
            if dtype == "int8":
                values = values * found[id_][f"{name}_scale"]
                limit = float(tensor.abs().max()) / 254 * 1.01
                assert np.abs(values - tensor[0].float().numpy()).max() <= limit
            else:
                assert np.array_equal(values, tensor[0].to(getattr(torch, dtype)).numpy())


def test_webdataset_reads_its_shards(store: FeatureStore, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    done = export(store, "webdataset", tmp_path / "shards", shard_size=20)
    shards = sorted(map(str, done.path.glob("*.tar")))
    assert len(shards) == done.manifest["shards"] == 3
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    # Keys as those of shards of the images themselves.
    assert [sample["__key__"] for sample in samples] == [id_.removesuffix(".jpg") for id_ in store]
    for sample, (id_, row) in zip(samples, expected(store).items(), strict=True):
        assert sample["json"] == {"id": id_, "height": 48, "width": 80}
        for name in ("cls", "feature_map", "registers", "layers_-1", "layers_0"):
            assert np.array_equal(sample[f"{name}.npy"], row[name])


@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "a.png"],  # one key
        ["a.tar.jpg", "b.jpg"],  # a dot in a key ends it
        ["/a.jpg", "b.jpg"],
        ["../a.jpg", "b.jpg"],
        [".jpg", "b.jpg"],
        ["line\nend.jpg", "b.jpg"],
    ],
)
def test_ids_that_are_not_keys_are_numbered(names: list[str], tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    fill(tmp_path / "out", FeatureSpec(cls=True), [(names, Features(torch.arange(6.0).reshape(2, 3)))])
    done = export(tmp_path / "out", "webdataset")
    assert done.manifest["keys"] == "number"
    samples = list(webdataset.WebDataset(str(done.path / "000000.tar"), shardshuffle=False).decode())
    assert [(sample["__key__"], sample["json"]["id"]) for sample in samples] == list(
        zip(["000000000", "000000001"], names, strict=True)
    )
    assert samples[1]["cls.npy"].tolist() == [3, 4, 5]


def test_rows_of_several_shapes(mixed: FeatureStore, to: Any, tmp_path: Path) -> None:
    done = export(mixed, to, tmp_path / "dest", shard_size=5)
    found = READERS[to](done.path)
    assert_rows({id_: found[id_] for id_ in mixed}, expected(mixed))
    if to == "npy":
        assert list(found) != list(mixed.ids)
        assert [part["rows"] for part in done.manifest["parts"]] == [8, 4]
        assert np.load(done.path / "part-1" / "feature_map.npy").shape == (4, 8, 4, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "to"), [("store", "npy"), ("mixed", "npy"), ("store", "webdataset"), ("store", "lance")]
)
def test_an_export_that_is_killed_goes_on(
    kind: str, to: str, store: FeatureStore, mixed: FeatureStore, tmp_path: Path
) -> None:
    """With -9, at each file operation, and at some rows."""
    if to == "lance":
        pytest.importorskip("lance")
    source, shard_size, every = (store, 16, 9) if kind == "store" else (mixed, 5, 3)
    command = [sys.executable, export_kills.__file__, source.folder.path, to, tmp_path, shard_size, every]
    ran = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=280)
    assert ran.returncode == 0, ran.stderr
    killed = json.loads(ran.stdout)
    assert killed["operation"] > 10
    assert killed["row"] >= len(source) / every
    undisturbed = READERS[to](tmp_path / "undisturbed")
    assert len(undisturbed) == len(source)
    resumed = [path for path in tmp_path.iterdir() if path.name != "undisturbed"]
    assert len(resumed) == sum(killed.values()) + 2  # the last of each kind came to its end
    for path in resumed:
        assert not path.name.endswith(".partial")
        if to == "lance":
            assert_rows(rows_of_lance(path), undisturbed)
        else:
            assert tree(path) == tree(tmp_path / "undisturbed"), path.name


class InterruptedExport(BaseException):
    """In place of whatever ends an export."""


def interrupt(source: FeatureStore, to: Any, dest: Path, *, after: int, patch: pytest.MonkeyPatch, **how: Any) -> None:
    """Export until ``after`` rows were read."""
    left = [after]

    def arrays(store: FeatureStore, id_: str) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise InterruptedExport
        return original(store, id_)

    original = FeatureStore.arrays
    with patch.context() as context:
        context.setattr(FeatureStore, "arrays", arrays)
        with pytest.raises(InterruptedExport):
            export(source, to, dest, **how)


def test_what_is_whole_stays(store: FeatureStore, to: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dest = tmp_path / "dest"
    interrupt(store, to, dest, after=36, patch=monkeypatch, shard_size=16)
    assert not dest.exists()
    forecasts: list[Any] = []
    # Without the size of shards, it takes that of the former run.
    done = export(store, to, dest, on_forecast=forecasts.append)
    assert done.images in (COUNT - 16, COUNT - 32)
    assert forecasts[0].remaining == done.images or to == "lance"
    assert_rows(READERS[to](dest), expected(store))
    before = tree(dest)
    assert export(store, to, dest).images == 0
    assert tree(dest) == before


def test_another_export_is_not_touched(
    store: FeatureStore, to: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest, other = tmp_path / "dest", tmp_path / "other"
    build(other, SPEC, FakeTeacher(hidden_size=8))
    for whole in (False, True):
        if whole:
            export(store, to, dest)
        else:
            interrupt(store, to, dest, after=36, patch=monkeypatch, shard_size=16)
        before = tree(tmp_path)
        for source, how, named in (
            (FeatureStore(other), {}, "store is .*'digest': '[0-9a-f]+'.*, there it is"),
            (store, {"dtype": "int8"}, "dtype is 'int8', there it is None"),
            *([(store, {"shard_size": 7}, "shard_size is 7, there it is 16")] if to != "npy" else []),
            (store, {"to": "npy" if to != "npy" else "webdataset"}, f"to is '.*', there it is '{to}'"),
        ):
            with pytest.raises(StoreError, match=f"holds another export: .*{named}"):
                export(source, **{"to": to, "dest": dest, **how})
        assert tree(tmp_path) == before


def test_what_is_not_an_export_is_not_touched(store: FeatureStore, to: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "beside.partial").mkdir()
    (tmp_path / "beside.partial" / "notes.txt").write_text("mine")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "export.json").write_text("{}")
    before = tree(tmp_path)
    for dest, rule in {
        "folder": r"folder holds something else \(notes.txt\)",
        "file": r"file holds something else \(no folder\)",
        "file/below": "must be where a folder can be made",
        "beside": r"beside.partial holds something else \(notes.txt\)",
        "odd": "is not that of an export",
        "s3://bucket/x": "must be a local folder",
        "/proc": "must not be a mount point",
    }.items():
        with pytest.raises(StoreError, match=rule):
            export(store, to, dest if dest[0] in "s/" else tmp_path / dest)
        assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert export(store, to, tmp_path / "link").path == tmp_path / "empty"
    assert len(READERS[to](tmp_path / "link")) == COUNT


def test_files_without_shards_go_on_with_any_shard_size(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(store, "npy", tmp_path / "dest", after=36, patch=monkeypatch, shard_size=16)
    assert 0 < export(store, "npy", tmp_path / "dest", shard_size=7).images < COUNT
    assert export(store, "npy", tmp_path / "dest", shard_size=11).images == 0
    export(store, "npy", tmp_path / "undisturbed", shard_size=16)
    assert tree(tmp_path / "dest") == tree(tmp_path / "undisturbed")


def test_the_working_directory_and_names_that_are_too_long_are_refused(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for dest in (".", tmp_path):
        with pytest.raises(StoreError, match="dest must not be the working directory, but may be a folder in it"):
            export(store, "npy", dest)
    for length in (250, 255, 256):
        with pytest.raises(StoreError, match=r"dest must be where a folder can be made; got .*: File name too long"):
            export(store, "npy", "x" * length)
    assert not list(tmp_path.iterdir())


def test_an_export_goes_on_when_the_stores_images_have_moved(store: FeatureStore, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.folder.path, tmp_path / "store"))
    done, digest = export(copy, "npy", tmp_path / "made"), FeatureStore(copy).digest()
    moved = {"path": "/elsewhere", "root": "/elsewhere"}  # as --source-moved leaves it
    change_json(copy / "manifest.json", source=moved)
    assert FeatureStore(copy).digest() == digest
    again = export(copy, "npy", tmp_path / "made")
    assert (again.images, again.manifest) == (0, done.manifest)


def test_an_unfinished_export_under_another_name_is_told(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(store, "npy", tmp_path / "dest", after=36, patch=monkeypatch, shard_size=16)
    with pytest.raises(ValueError, match=r"mmap length|cannot reshape"):
        np.load(tmp_path / "dest.partial" / "cls.npy", mmap_mode="r")
    (tmp_path / "dest.partial").rename(tmp_path / "dest")
    with pytest.raises(StoreError, match=r"dest is not whole, but has been renamed: its name must be .*dest\.partial"):
        export(store, "npy", tmp_path / "dest")


def test_a_store_that_can_still_grow_is_refused(to: Any, tmp_path: Path) -> None:
    build(tmp_path / "out", SPEC, FakeTeacher(), end=False)
    with pytest.raises(StoreError, match="is not finished"):
        export(tmp_path / "out", to)
    with pytest.raises(StoreError, match="store must be finished"):
        export(FeatureStore(tmp_path / "out", partial=True), to)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_at_a_time(store: FeatureStore, to: Any, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    (tmp_path / "dest.partial").mkdir()
    with Folder.at(tmp_path / "dest.partial").exclusive(), pytest.raises(StoreError, match="by another run"):
        export(store, to, dest)
    export(store, to, dest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dest"]
    assert not (dest / ".lock").exists()


def test_one_that_comes_second_finds_what_the_first_made(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked before the other had begun."""
    dest, hold, others = tmp_path / "dest", exporting.Destination.hold, []

    def first_the_other(self: exporting.Destination) -> Any:
        if not others:
            others.append(self)
            others.append(export(store, "npy", dest))
        return hold(self)

    monkeypatch.setattr(exporting.Destination, "hold", first_the_other)
    done = export(store, "npy", dest)
    assert (others[1].images, done.images) == (COUNT, 0)
    assert done.manifest == others[1].manifest
    assert not (tmp_path / "dest.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["npy", "webdataset"])
def test_memory_does_not_grow_with_the_store(to: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grown = []
    original = FeatureStore.arrays
    for blocks in (1, 8):
        features = Features(feature_map=torch.rand(100, 384, 14, 14))
        names = [([f"{block}/{index}.jpg" for index in range(100)], features) for block in range(blocks)]
        source = fill(tmp_path / str(blocks), FeatureSpec(feature_map=True, dtype="float16"), names)
        seen: list[float] = []

        def arrays(store: FeatureStore, id_: str, seen: list[float] = seen) -> Any:
            seen.append(resident())
            return original(store, id_)

        monkeypatch.setattr(FeatureStore, "arrays", arrays)
        export(source, to, shard_size=50)
        assert len(seen) >= len(source)
        grown.append(max(seen) - seen[0])
    assert grown[1] < 20, f"120 MB of features took {grown} MiB"


def test_a_value_that_float16_cannot_hold_is_an_error(to: Any, tmp_path: Path) -> None:
    features = Features(torch.tensor([[1.0], [70000.0]]))
    fill(tmp_path / "out", FeatureSpec(cls=True), [(["a.jpg", "b.jpg"], features)])
    with pytest.raises(NumericsError, match=r"'b\.jpg': dtype float16 holds values up to 65504; output cls reaches 7e"):
        export(tmp_path / "out", to, dtype="float16")
    assert not (tmp_path / f"out.{to}").exists()


@pytest.mark.parametrize(
    ("how", "error", "rule"),
    [
        ({"to": "csv"}, ConfigError, "to must be one of lance, webdataset, npy; got 'csv'"),
        ({"dtype": "bfloat16"}, ConfigError, "dtype must be one of float32, float16, int8, or None; got 'bfloat16'"),
        ({"shard_size": 0}, ConfigError, "shard_size must be an integer, at least 1; got 0"),
        ({"shard_size": True}, ConfigError, "shard_size must be an integer, at least 1; got True"),
        ({"store": "nowhere"}, StoreError, "is not a feature store"),
    ],
)
def test_mistakes_are_told(store: FeatureStore, how: Any, error: type[DinoV3Error], rule: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=rule):
        export(**{"store": store, "to": "npy", "dest": tmp_path / "dest", **how})
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_told(store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(ConfigError, match=r"pip install 'dinov3-ray\[lance\]'"):
        export(store, "lance", tmp_path / "dest")
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_not_begun(store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "free_bytes", lambda _: 1000)
    with pytest.raises(StoreError, match=r"dest must have room for the rows: 50 images, .* 1\.0 kB free"):
        export(store, "npy", tmp_path / "dest")
    assert not list(tmp_path.iterdir())
    assert export(store, "npy", tmp_path / "dest", check_space=False).images == COUNT


def test_a_damaged_unfinished_export_is_told(
    store: FeatureStore, to: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(store, to, tmp_path / "dest", after=45, patch=monkeypatch, shard_size=16)
    parts = {"npy": "cls.npy", "webdataset": "000000.tar", "lance": "_versions/*.manifest"}
    for path in (tmp_path / "dest.partial").glob(parts[to]):
        path.unlink()
    with pytest.raises(StoreError, match=r"is damaged.*[Dd]elete .*dest\.partial, and start anew"):
        export(store, to, tmp_path / "dest")
    (tmp_path / "dest.partial" / "export.json").write_text("{")
    with pytest.raises(StoreError, match=r"export\.json is damaged.*Delete .*dest\.partial, and start anew"):
        export(store, to, tmp_path / "dest")


SMALL_DISK = """
mount -t tmpfs -o size=120k none "$1" || exit 77
shift
"$@"
echo "status $?"
ls "$0"
mount -o remount,size=40m "$0" && "$@"
echo "status $?"
cp -r "$0"/dest "$0"-copied
"""


@pytest.mark.slow
def test_a_full_disk_is_told_and_loses_nothing(store: FeatureStore, to: Any, tmp_path: Path) -> None:
    """On a file system in memory, in a mount namespace of its own, which ends with its processes."""
    small = tmp_path / "small"
    small.mkdir()
    command = [sys.executable, "-m", "dinov3_ray", "export", store.folder.path, small / "dest", "--to", to]
    command += ["--shard-size", 10, "--force"]
    words = ["unshare", "--mount", "--map-root-user", "sh", "-c", SMALL_DISK, small, small, *command]
    ran = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=120, check=False)
    if ran.returncode == 77 or "unshare" in ran.stderr:
        pytest.skip(f"no mount namespaces here: {ran.stderr}")
    said = " ".join(ran.stderr.split())
    assert "status 1\ndest.partial\n" in ran.stdout, ran
    assert "dest.partial is full: " in said
    assert "are still to be written" in said
    assert "Traceback" not in said
    assert f"{small}/dest: {COUNT} rows\n  1 images could not be read" in ran.stdout
    assert ran.stdout.endswith("status 0\n")
    assert_rows(READERS[to](tmp_path / "small-copied"), expected(store))
