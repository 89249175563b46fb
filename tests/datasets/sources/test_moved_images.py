"""A store whose images lie elsewhere now: they are found by their names there, and recognised by their pixels."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from picturefiles import image_bytes
from pyarrow import fs as pafs
from stores import store_of

from dinov3_ray.datasets import FeatureStore, StoredTeacher, TargetDataset
from dinov3_ray.datasets.decode import Decoder, Unreadable
from dinov3_ray.datasets.sources.open import open_source
from dinov3_ray.datasets.sources.reopen import reopen_source
from dinov3_ray.datasets.stored import Originals
from dinov3_ray.errors import ConfigError, InputError, MissingViewError, StoreError
from dinov3_ray.features import FeatureSpec

NAMES = [f"{index % 2}/{index}.png" for index in range(6)]
PICTURES = {name: image_bytes(index, "PNG") for index, name in enumerate(NAMES)}
CLS = FeatureSpec(cls=True)


def write_source(kind: str, root: Path) -> Path:
    """The pictures in ``root``, in one of the forms of a source; gives what is extracted."""
    root.mkdir()
    if kind == "parquet":
        cells = [{"bytes": data, "path": None} for data in PICTURES.values()]
        pq.write_table(pa.table({"id": list(PICTURES), "image": cells}), root / "0.parquet", row_group_size=4)
        return root
    if kind == "webdataset":
        with tarfile.open(root / "0.tar", "w") as archive:
            for name, data in PICTURES.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return root / "0.tar"
    for name, data in PICTURES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    return root / "*" / "*.png" if kind == "glob" else root


@pytest.fixture
def moved(tmp_path: Path) -> tuple[FeatureStore, Path]:
    """A store, and the folder where its images lie now; the store has moved, too."""
    store_of(write_source("folder", tmp_path / "photographs"), tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "copied")
    return FeatureStore(tmp_path / "copied"), (tmp_path / "photographs").rename(tmp_path / "elsewhere")


@pytest.mark.parametrize("kind", ["folder", "glob", "webdataset", "parquet"])
def test_images_are_read_where_they_lie_now(kind: str, tmp_path: Path) -> None:
    source = write_source(kind, tmp_path / "source")
    store = store_of(source, tmp_path / "out")
    before = [pixels for pixels, _ in TargetDataset(store)]
    assert np.array_equal(before[0], Decoder().read(PICTURES[NAMES[0]], "0"))
    now = (tmp_path / "source").rename(tmp_path / "elsewhere")
    for pixels, images in ((before, now), (before, f"file://{now}")):
        dataset = pickle.loads(pickle.dumps(TargetDataset(store, images=images)))
        assert all(np.array_equal(a, b) for a, (b, _) in zip(pixels, dataset, strict=True))
    system, root = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "elsewhere"
    subset = TargetDataset(store, ids=store.ids[3:4], images=root, filesystem=system)
    assert np.array_equal(subset[0][0], before[3])
    if kind == "glob":
        assert len(TargetDataset(store, images=now / "*" / "*.png")) == len(NAMES)
        with pytest.raises(StoreError, match=r"images must be where .*; there is nothing at '/no/where/\*"):
            TargetDataset(store, images="/no/where/*.png")
    if source.suffix == ".tar":
        assert len(TargetDataset(store, images=now / source.name)) == len(NAMES)


def test_where_they_are_no_longer_the_error_names_the_way_out(moved: tuple[FeatureStore, Path]) -> None:
    store, now = moved
    with pytest.raises(InputError, match=r"cannot be read \(missing\).*if it lies elsewhere now, images=FOLDER says"):
        TargetDataset(store)[0]
    (now / NAMES[0]).unlink()
    dataset = TargetDataset(store, images=now)
    with pytest.raises(InputError, match=rf"image '{NAMES[0]}' cannot be read \(missing\): {now / NAMES[0]} .*there"):
        dataset[0]
    assert dataset[1][0].dtype == np.uint8
    with pytest.raises(
        StoreError, match=r"images must be where the images of .* lie now; there is nothing at '/no/where"
    ):
        TargetDataset(store, images="/no/where")
    # A folder above the right one, or below it, has none of them.
    for wrong in (now.parent, now / "1"):
        with pytest.raises(StoreError, match=rf"images must hold the files of .* None of the next 6 files .* {wrong}/"):
            TargetDataset(store, images=wrong)
    with pytest.raises(ConfigError, match="one of read and images must be given, not both"):
        TargetDataset(store, len, images=now)


def test_other_pixels_under_the_same_name_are_refused(moved: tuple[FeatureStore, Path]) -> None:
    store, now = moved
    shutil.copy(now / NAMES[2], now / NAMES[0])
    for read in (lambda: TargetDataset(store, images=now)[0], lambda: Originals(store, now)(NAMES[0])):
        with pytest.raises(StoreError, match=f"image '{NAMES[0]}' in {now} is not the one .* its pixels have changed"):
            read()
    teacher = StoredTeacher(store, images=now)
    with pytest.raises(StoreError, match="its pixels have changed"):
        teacher.extract(NAMES[0], CLS)
    assert StoredTeacher(store).extract(NAMES[0], CLS).cls is not None, "an id is taken at its word without images"


def test_a_stored_teacher_takes_paths_below_the_images(
    moved: tuple[FeatureStore, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, now = moved
    teacher = StoredTeacher(store, images=now)
    expected = store.read(NAMES[:2]).cls
    assert expected is not None
    monkeypatch.chdir(now.parent)
    relative = os.path.join(now.name, NAMES[0])
    paths = [now / name for name in NAMES[:2]]
    for names in (NAMES[:2], [str(path) for path in paths], [relative, NAMES[1]], paths, [Path(relative), NAMES[1]]):
        found = teacher.extract(names, CLS).cls
        assert found is not None
        assert torch.equal(found, expected)
    shutil.rmtree(now)
    assert len(teacher.extract(NAMES[:2], CLS)) == 2, "each file is read once"
    with pytest.raises(InputError, match=rf"cannot be read \(missing\): {now / NAMES[2]}"):
        teacher.extract(NAMES[2], CLS)
    with pytest.raises(MissingViewError, match=rf"no view '/other/0.png', nor is it a path below {now}"):
        teacher.extract("/other/0.png", CLS)
    with pytest.raises(StoreError, match="images must be where"):
        StoredTeacher(store, images=now)


def test_rows_of_a_dataset_are_read_where_their_ids_are_paths(moved: tuple[FeatureStore, Path]) -> None:
    store, now = moved
    store.manifest["source"] = {"kind": "dataset", "image_column": "image", "id_column": "path"}
    with pytest.raises(StoreError, match="rows of a Ray Dataset: read them from there, or, where their ids are paths"):
        TargetDataset(store)
    dataset = TargetDataset(store, images=now)
    assert np.array_equal(dataset[4][0], Decoder().read(PICTURES[store.ids[4]], "4"))


@pytest.mark.parametrize("old", ["/mnt/old/photographs", "bucket/photographs", "s3://bucket/photographs"])
@pytest.mark.parametrize("levels", [0, 1])
def test_ids_that_are_paths_of_another_place_are_found_below_the_new_one(old: str, levels: int, tmp_path: Path) -> None:
    names = [f"{old}/train/{name}" for name in NAMES]
    root = write_source("folder", tmp_path / "train")
    store = store_of(root, tmp_path / "out", names=dict(zip(NAMES, names, strict=True)))
    store.manifest["source"] = {"kind": "dataset", "image_column": "image", "id_column": "path"}
    now = root if levels == 0 else tmp_path  # what was the folder of all images, or one around it
    dataset = TargetDataset(store, images=now)
    assert np.array_equal(dataset.read(names[4]), Decoder().read(PICTURES[NAMES[4]], "4"))
    teacher, expected = StoredTeacher(store, images=now), store.read(names[:2]).cls
    assert expected is not None
    for asked in ([root / name for name in NAMES[:2]], names[:2]):
        found = teacher.extract(asked, CLS).cls
        assert found is not None
        assert torch.equal(found, expected)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"images must hold the files of .* None of the next 6 files is there"):
        TargetDataset(store, images=tmp_path / "empty")


@pytest.mark.parametrize("layout", ["below", "beside"])
def test_paths_in_rows_have_moved_with_their_parquet_files(layout: str, tmp_path: Path) -> None:
    before, now = tmp_path / "before", tmp_path / "now"
    before.mkdir()
    images = write_source("folder", before / "images")
    cells = [{"bytes": None, "path": str(images / name)} for name in NAMES]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    root = before if layout == "below" else before / "meta"
    root.mkdir(exist_ok=True)
    pq.write_table(pa.table({"id": NAMES, "image": pa.array(cells, kind)}), root / "0.parquet")
    store = store_of(root / "*.parquet", tmp_path / "out")
    before.rename(now)
    with pytest.raises(InputError, match=r"cannot be read \(missing\).*images=FOLDER says where"):
        TargetDataset(store)[0]
    new_root = now if layout == "below" else now / "meta"
    dataset = pickle.loads(pickle.dumps(TargetDataset(store, images=new_root)))
    assert np.array_equal(dataset[3][0], Decoder().read(PICTURES[NAMES[3]], "3"))
    # The same, of a run that goes on there: its new description says whence it came, however often it moves.
    described = store.manifest["source"]
    for place in (new_root, now.rename(tmp_path / "third") / new_root.relative_to(now)):
        source = reopen_source(described, place / "*.parquet", moved=True)
        described = source.describe()
        assert described["moved_from"] == str(root)
    again = reopen_source(described, described["path"])
    assert again.describe() == described
    rows = open_source(described["path"]).rows()
    assert dict(again.read(rows)) == PICTURES
    (tmp_path / "third" / "images" / NAMES[0]).unlink()
    gone = dict(again.read(rows))[NAMES[0]]
    assert isinstance(gone, Unreadable)
    assert f"its path '{images / NAMES[0]}' leads to nothing (looked at {tmp_path / 'third'}" in gone.detail
