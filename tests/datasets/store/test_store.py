"""FeatureStore: what comes back is what was written, mapped where Parquet lets it; StoredTeacher and TargetDataset."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from file_changes import change_json
from pyarrow import fs as pafs
from sample_features import random_features, same
from stores import COUNT, SPEC, build, ids, list_type, views
from torch.utils.data import DataLoader

from dinov3_ray.config import DinoV3Config
from dinov3_ray.datasets import FeatureStore, StoredTeacher, TargetDataset, extract
from dinov3_ray.datasets.cache_db import pack
from dinov3_ray.datasets.folder import Folder
from dinov3_ray.datasets.store.pages import unnest
from dinov3_ray.datasets.store.schema import FORMAT, Row, encode_columns, spec_to_json
from dinov3_ray.datasets.store.writer import BlockWriter, finish
from dinov3_ray.errors import MissingViewError, NumericsError, SpecError, StoreError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import Images
from dinov3_ray.model import DinoV3Teacher
from dinov3_ray.testing import FakeTeacher


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["native", "float32", "bfloat16", "float16", "int8"])
def test_what_comes_back_is_what_the_teacher_gives(dtype: str, compute: torch.dtype, tmp_path: Path) -> None:
    spec = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(-1, 0), dtype=dtype)  # type: ignore[arg-type]
    expected = build(tmp_path, spec, FakeTeacher(dtype=compute))
    store = FeatureStore(tmp_path)
    assert len(store) == COUNT
    assert list(store.ids) == list(store) == ids()
    assert store.fingerprint == "fake"
    assert store.spec == spec
    for index in (0, 19, 20, COUNT - 1, 7):
        features = store[ids()[index]]
        assert len(features) == 1
        assert features.fingerprint == "fake"
        assert same(features, expected.rows(index, index + 1))
    batches = list(store.iter_batches(7))
    assert [id_ for names, _ in batches for id_ in names] == ids()
    assert same(Features.cat([features for _, features in batches]), expected)
    assert [len(features) for _, features in store.iter_batches(20, drop_last=True)] == [20, 20]
    order = [33, 3, 4, 5, 21, 3]
    assert same(store.read([ids()[index] for index in order]), Features.cat([expected.rows(i, i + 1) for i in order]))


@pytest.mark.parametrize("dtype", ["native", "float16", "int8"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_files_are_the_same_whatever_the_memory_order(compute: torch.dtype, dtype: str, tmp_path: Path) -> None:
    spec = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(5, -1), dtype=dtype)  # type: ignore[arg-type]
    rows, written, cached = [Row(str(index), 9, 9, b"0" * 16) for index in range(3)], [], []
    for order in (torch.contiguous_format, torch.channels_last):
        features = random_features(3, compute, order=order)
        folder = Folder.at(tmp_path / str(order))
        folder.make("parts")
        folder.make("ledger")
        writer = BlockWriter(folder, "block", {"batch_size": 3})
        writer.add([2, 0, 1], rows, encode_columns(features, spec)[0])
        writer.commit()
        written.append((tmp_path / str(order) / "parts" / "block.parquet").read_bytes())
        value = pack(features)  # behind its header, whose metadata has no order
        cached.append(value[8 + int.from_bytes(value[:8], "little") :])
    assert written[0] == written[1]
    assert cached[0] == cached[1]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_columns_are_mapped_and_any_parquet_reader_reads_them(dtype: str, tmp_path: Path) -> None:
    spec = FeatureSpec(feature_map=True, dtype=dtype)  # type: ignore[arg-type]
    teacher = FakeTeacher(hidden_size=64)
    build(tmp_path, spec, teacher)
    store = FeatureStore(tmp_path)
    array = store.arrays(ids()[21])["feature_map"]
    assert not array.flags.owndata
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[...] = 0
    first = store[ids()[0]].feature_map
    assert first is not None
    first.zero_()  # the caller's own memory
    assert store[ids()[0]].feature_map.any()  # type: ignore[union-attr]
    table = pq.read_table(sorted((tmp_path / "parts").iterdir()))
    assert table["id"].to_pylist() == ids()
    expected, _ = encode_columns(teacher.extract(views(), spec.native()), spec)
    for name, values in expected.items():
        assert table.schema.field(name).type == list_type(values.dtype, values.shape[1:])
        assert np.array_equal(unnest(table[name], values.shape[1:]), values)
    # The values, 2 bits each for the lists, and little more: 20 rows have too many other bytes to ask for less.
    size = sum(path.stat().st_size for path in (tmp_path / "parts").iterdir())
    assert size < sum(1.1 * values.nbytes + values.size / 4 for values in expected.values()) + 12_000


def test_columns_without_an_offset_are_decoded(tmp_path: Path) -> None:
    """As a release of pyarrow may write them that is not known here; with small row groups, too."""
    expected = build(tmp_path, FeatureSpec(cls=True, feature_map=True, dtype="int8"), FakeTeacher())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for part in (part for block in manifest["blocks"] for part in block["parts"]):
        path = tmp_path / "parts" / part["file"]
        pq.write_table(pq.read_table(path), path, row_group_size=3, compression="none")
        for column in part["columns"].values():
            column["offset"] = None
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    order = [33, 3, 4, 5, 21, 3]
    assert same(
        FeatureStore(tmp_path).read([ids()[index] for index in order]),
        Features.cat([expected.rows(i, i + 1) for i in order]),
    )


@pytest.mark.slow
def test_int8_of_random_weights_keeps_the_direction(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Documented: cosine at least 0.999 for every token, and at most 1/254 of a token's largest channel off."""
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32"))
    build(tmp_path, FeatureSpec(cls=True, feature_map=True, layers=(1,), dtype="int8"), teacher)
    exact = teacher.extract(views(), FeatureSpec(cls=True, feature_map=True, layers=(1,)))
    stored = FeatureStore(tmp_path).read(ids())
    for (_, mine), (_, other) in zip(stored.named(), exact.named(), strict=True):
        assert torch.nn.functional.cosine_similarity(mine, other, dim=1).min() > 0.999
        assert ((mine - other).abs() <= other.abs().amax(dim=1, keepdim=True) / 254 * 1.001).all()


def test_a_value_that_float16_cannot_hold_is_an_error() -> None:
    features = Features(cls=torch.tensor([[1.0, 70_000.0]]))
    with pytest.raises(NumericsError, match="holds values up to 65504; output cls reaches 7e"):
        encode_columns(features, FeatureSpec(cls=True, dtype="float16"))


def test_an_output_without_values_is_refused() -> None:
    features = Features(registers=torch.zeros(2, 0, 8))
    with pytest.raises(SpecError, match=r"must have values; registers is \[2, 0, 8\]: leave it out"):
        encode_columns(features, FeatureSpec(registers=True))


def test_what_is_stored_is_not_narrowed_to_infinity(tmp_path: Path) -> None:
    class Large(FakeTeacher):
        def extract(self, images: Images, spec: FeatureSpec) -> Features:
            return super().extract(images, spec).map(lambda _, tensor: tensor.abs() + 70_000)

    build(tmp_path, FeatureSpec(cls=True), Large())
    teacher = StoredTeacher(FeatureStore(tmp_path))
    with pytest.raises(NumericsError, match="exceed float16, which ends at 65504"):
        teacher.extract(views(), FeatureSpec(cls=True, dtype="float16"))
    features = teacher.extract(views(), FeatureSpec(cls=True, dtype="bfloat16"))
    assert features.cls is not None
    assert features.cls.isfinite().all()


def test_remote_file_systems_read_what_they_need(tmp_path: Path) -> None:
    expected = build(tmp_path / "x" / "store", SPEC, FakeTeacher())
    store = FeatureStore("store", filesystem=pafs.SubTreeFileSystem(str(tmp_path / "x"), pafs.LocalFileSystem()))
    assert same(store.read(ids()), expected)
    assert same(FeatureStore((tmp_path / "x" / "store").as_uri())[ids()[3]], expected.rows(3, 4))


def test_pickled_and_in_loader_workers(tmp_path: Path) -> None:
    expected = build(tmp_path, SPEC, FakeTeacher())
    store = pickle.loads(pickle.dumps(FeatureStore(tmp_path)))
    images = dict(zip(ids(), views(), strict=True))
    dataset = TargetDataset(store, images.__getitem__)
    assert len(dataset) == COUNT
    loader = DataLoader(
        dataset, batch_size=8, num_workers=2, collate_fn=TargetDataset.collate, multiprocessing_context="fork"
    )
    pixels, targets = zip(*loader, strict=True)
    assert torch.equal(torch.cat(pixels), views())
    assert same(Features.cat(targets), expected)
    subset = TargetDataset(store, images.__getitem__, ids=[ids()[5], ids()[2]])
    assert torch.equal(subset[1][0], views()[2])
    with pytest.raises(StoreError, match="has no image 'nope'"):
        TargetDataset(store, images.__getitem__, ids=["nope"])


def test_what_is_not_there_says_why(tmp_path: Path) -> None:
    build(tmp_path, SPEC, FakeTeacher())
    store = FeatureStore(tmp_path)
    with pytest.raises(StoreError, match=r"'bad\.jpg' has no features.*\(truncated\): it ends early"):
        store["bad.jpg"]
    with pytest.raises(StoreError, match=r"has no image 'nope'; its ids look like \('folder 0/ä000\.jpg',\)"):
        store["nope"]
    with pytest.raises(StoreError, match=r"an image's id must be a str.*got 3"):
        store[3]  # type: ignore[index]
    assert "nope" not in store
    assert ids()[0] in store
    assert store.errors.to_pylist() == [{"id": "bad.jpg", "kind": "truncated", "detail": "it ends early"}]
    assert store.manifest["errors_by_kind"] == {"truncated": 1}
    assert repr(store).endswith("50 images, teacher fake)")
    with pytest.raises(StoreError, match=r"is not a feature store: it has no plan\.json"):
        FeatureStore(tmp_path / "parts")
    with pytest.raises(StoreError, match="is not a feature store"):
        FeatureStore(tmp_path / "plan.json")
    with pytest.raises(StoreError, match="ids must be a sequence of at least one id; got "):
        store.read([])


def test_a_damaged_part_is_named_with_what_repairs_it(tmp_path: Path) -> None:
    build(tmp_path, SPEC, FakeTeacher())
    path = tmp_path / "parts" / "0000001.parquet"
    store = FeatureStore(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(
        StoreError, match=r"0000001\.parquet is damaged, or cannot be read: the file ends early.*0000001\.json and"
    ):
        store[ids()[39]]
    path.unlink()
    with pytest.raises(StoreError, match=r"0000001\.parquet is damaged, or cannot be read: .*run the extraction again"):
        FeatureStore(tmp_path)[ids()[39]]
    assert len(FeatureStore(tmp_path)[ids()[3]]) == 1
    with pytest.raises(StoreError, match=r"0000001\.parquet is damaged, or cannot be read: .*run the extraction again"):
        finish(Folder.at(tmp_path), {})


@pytest.mark.parametrize("name", ["manifest.json", "index.parquet", "errors.parquet", "plan.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_damaged_files_are_named_with_what_repairs_them(name: str, content: bytes | None, tmp_path: Path) -> None:
    build(tmp_path, SPEC, FakeTeacher())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(StoreError, match=r"is damaged, or cannot be read: |is not finished|it has no plan\.json"):
        FeatureStore(tmp_path)["bad.jpg"]


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (1, "has format 1. Remedy: extract the images again, into another folder"),
        (None, "has none. Remedy: extract the images again, into another folder"),
        (FORMAT + 1, f"has format {FORMAT + 1}. Remedy: install the release that wrote it"),
    ],
)
def test_a_store_of_another_format_is_refused(found: int | None, told: str, tmp_path: Path) -> None:
    build(tmp_path, SPEC, FakeTeacher())
    run = {"source": {}, "batch_size": 13, "block_size": 20, "outputs": {}, "format": found}
    for name in ("plan.json", "manifest.json"):
        change_json(tmp_path / name, **run)
    message = f"must have format {FORMAT} for this release; .*{told}"
    for partial in (False, True):
        with pytest.raises(StoreError, match=message):
            FeatureStore(tmp_path, partial=partial)
    with pytest.raises(StoreError, match=message):  # before any Ray is started
        extract(tmp_path, tmp_path, FakeTeacher.factory())


def test_an_unfinished_store_is_read_on_request_only(tmp_path: Path) -> None:
    expected = build(tmp_path, SPEC, FakeTeacher(), end=False)
    with pytest.raises(StoreError, match="is not finished"):
        FeatureStore(tmp_path)
    (tmp_path / "ledger" / "0000001.json").unlink()
    store = FeatureStore(tmp_path, partial=True)
    assert list(store.ids) == ids()[:20] + ids()[40:]
    assert same(store[ids()[45]], expected.rows(45, 46))
    assert "unfinished" in repr(store)


def test_a_stored_teacher_answers_for_stored_views_only(tmp_path: Path) -> None:
    expected = build(tmp_path, SPEC, FakeTeacher())
    teacher = StoredTeacher(FeatureStore(tmp_path))
    images = views()[[4, 40, 4]]
    wanted = Features.cat([expected.rows(index, index + 1) for index in (4, 40, 4)])
    names = [ids()[index] for index in (4, 40, 4)]
    for form in (
        images,
        images.float() / 255,
        images.float() * (1 / 255),
        images.double() / 255,
        images.numpy(),
        list(images),
    ):
        assert same(teacher.extract(form, SPEC), wanted)
    assert same(teacher.extract(names, SPEC), wanted)
    assert same(teacher.extract(images, SPEC, ids=names), wanted)
    assert torch.equal(teacher.extract_features(names), wanted.cls)  # type: ignore[arg-type]
    assert torch.equal(teacher.extract_feature_map(images), wanted.feature_map)  # type: ignore[arg-type]
    others = [
        images.flip(-1),
        images.float() / 255 * 0.999,
        images[..., :32],
        images.float() / 255 + 1e-4,
        views(seed=1)[:3],
    ]
    for other in others:
        with pytest.raises(MissingViewError, match=r"images\[0\] is not a view that the store holds"):
            teacher.extract(other, SPEC)
        with pytest.raises(MissingViewError, match=r"images\[0\] is no"):
            teacher.extract(other, SPEC, ids=names)
    with pytest.raises(MissingViewError, match=r"images\[1\] is not the view of"):
        teacher.extract(images, SPEC, ids=[names[0], names[0], names[2]])
    with pytest.raises(MissingViewError, match=r"holds no view 'bad\.jpg'"):
        teacher.extract("bad.jpg", SPEC)


def test_a_stored_teacher_gives_what_was_extracted_and_no_more(tmp_path: Path) -> None:
    expected = build(
        tmp_path, FeatureSpec(feature_map=True, layers=(-1, 0), map_size=(3, 5), dtype="float16"), FakeTeacher()
    )
    teacher = StoredTeacher(FeatureStore(tmp_path))
    part = teacher.extract(ids()[:2], FeatureSpec(layers=(0,), map_size=(3, 5)))
    assert [name for name, _ in part.named()] == ["layers.0"]
    assert torch.equal(part.layers[0], expected.layers[0][:2])
    wide = teacher.extract(ids()[0], FeatureSpec(feature_map=True, map_size=(3, 5), dtype="float32")).feature_map
    assert torch.equal(wide, expected.feature_map[:1].float())  # type: ignore[arg-type, index]
    for spec, message in (
        (FeatureSpec(cls=True, layers=(1,), map_size=(3, 5)), "does not hold cls, layers 1"),
        (FeatureSpec(layers=(0,), norm=False, map_size=(3, 5)), "norm must be True"),
        (FeatureSpec(feature_map=True, map_size=(2, 2)), r"map_size must be \(3, 5\)"),
        (FeatureSpec(), "at least one of"),
    ):
        with pytest.raises(SpecError, match=message):
            teacher.extract(ids()[0], spec)


@pytest.mark.slow
def test_a_store_may_have_more_parts_than_a_process_may_open_files(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "many")
    folder.make("parts")
    folder.make("ledger")
    spec = spec_to_json(FeatureSpec(cls=True))
    identity = {"format": FORMAT, "fingerprint": "f", "spec": spec, "result_dtype": "float32"}
    identity["batch_size"] = 1
    folder.write_json("plan.json", identity)
    for block in range(100):
        writer = BlockWriter(folder, f"{block:07}", identity)
        writer.add([0], [Row(str(block), 1, 1, b"v" * 16)], {"cls": np.full((1, 8), block, np.float32)})
        writer.commit()
    finish(folder, identity)
    program = """
import resource, sys
from dinov3_ray.datasets import FeatureStore
store = FeatureStore(sys.argv[1])
import os
opened = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, opened + 20))
assert all(float(store[id_].cls[0, 0]) == int(id_) for id_ in store.ids)
assert len(store) == 100
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "many")], check=True, timeout=60)


def test_parts_of_several_batch_sizes_say_theirs(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    folder.make("parts")
    folder.make("ledger")
    spec = spec_to_json(FeatureSpec(cls=True))
    identity = {"format": FORMAT, "fingerprint": "f", "spec": spec, "result_dtype": "float32"}
    folder.write_json("plan.json", identity)
    for block, batch_size in enumerate((32, 8, 32)):
        writer = BlockWriter(folder, f"{block:07}", {**identity, "batch_size": batch_size})
        # Outputs of another shape are a part of their own.
        writer.add([0], [Row(f"{block} first", 1, 1, b"v" * 16)], {"cls": np.zeros((1, 8), np.float32)})
        writer.add([1], [Row(f"{block} then", 1, 1, b"v" * 16)], {"cls": np.zeros((1, 8 + block % 2), np.float32)})
        writer.commit()
    made = finish(folder, {**identity, "batch_size": 8})
    assert made["batch_sizes"] == {"8": 2, "32": 2}
    assert "batch_size" not in made, "there is more than one"
    assert [[part["batch_size"] for part in entry["parts"]] for entry in made["blocks"]] == [[32], [8, 8], [32]]
    for entry in made["blocks"]:
        for part in entry["parts"]:
            metadata = pq.read_schema(tmp_path / "parts" / part["file"]).metadata[b"dinov3_ray"]
            assert json.loads(metadata)["batch_size"] == part["batch_size"]
    assert FeatureStore(tmp_path).manifest == made


def test_layers_come_in_the_order_in_which_they_are_asked_for(tmp_path: Path) -> None:
    spec = FeatureSpec(layers=(3, 1))
    teacher = FakeTeacher(depth=4)
    build(tmp_path, spec, teacher)
    for asked in ((3, 1), (1, 3)):
        stored = StoredTeacher(FeatureStore(tmp_path)).extract(views()[:2], FeatureSpec(layers=asked))
        live = teacher.extract(views()[:2], FeatureSpec(layers=asked))
        assert list(stored.layers) == list(live.layers) == list(asked)
