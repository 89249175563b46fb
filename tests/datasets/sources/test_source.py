"""Sources: every image is listed once, in one order, and read as it is."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin
from pyarrow import fs as pafs
from sourcefiles import add, everything, write

from dinov3_ray.datasets.decode import Unreadable
from dinov3_ray.datasets.extraction.blocks import ListedBlocks
from dinov3_ray.datasets.folder import Folder
from dinov3_ray.datasets.sources.open import matches, open_source
from dinov3_ray.datasets.sources.reopen import check_there, reopen_source
from dinov3_ray.datasets.sources.source import content_of
from dinov3_ray.errors import StoreError


def test_a_folder_gives_every_file_by_its_relative_path(tmp_path: Path) -> None:
    contents = write(tmp_path, ["b.jpg", "a/ä ö.png", "a/b/deep.webp"])
    write(tmp_path, [".hidden.jpg", ".git/x.jpg", "out/part.jpg"])
    source = open_source(tmp_path, exclude=str(tmp_path / "out"))
    assert everything(source) == contents
    assert list(everything(source)) == sorted(contents)
    assert everything(open_source(tmp_path.as_uri(), exclude=str(tmp_path / "out"))) == contents


def test_labels_caches_and_archives_beside_images_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contents = write(tmp_path, ["images/1.JPG", "images/2.heic", "3.Png"])
    write(tmp_path, ["labels/1.txt", "labels/2.TXT", "train.cache", "data.yaml", "LICENSE", "all.zip"])
    pq.write_table(pa.table({"file_name": ["3.Png"], "box": [[0.0, 1.0]]}), tmp_path / "boxes.parquet")
    assert everything(open_source(tmp_path)) == contents
    assert "left out are files whose names are not those of images: 2 .txt, 1 " in caplog.text
    assert all(f"1 {extension}" in caplog.text for extension in (".yaml", "no extension", ".zip", ".parquet"))
    caplog.clear()
    assert everything(open_source(tmp_path / "images")).keys() == {"1.JPG", "2.heic"}
    assert not caplog.text


def test_without_names_of_images_each_file_is_taken_for_one(tmp_path: Path) -> None:
    contents = write(tmp_path, ["a/0001", "a/0002", "notes.txt"])
    assert everything(open_source(tmp_path)) == contents


def test_extensions_of_registered_plugins_are_names_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = write(tmp_path, ["1.jpg", "2.strips", "3.h5"])
    assert everything(open_source(tmp_path)).keys() == {"1.jpg"}
    monkeypatch.setattr(Image, "OPEN", {**Image.OPEN, "STRIPS": (PngImagePlugin.PngImageFile, None)})
    monkeypatch.setattr(Image, "EXTENSION", {**Image.EXTENSION, ".strips": "STRIPS"})
    assert everything(open_source(tmp_path)).keys() == {"1.jpg"}, "one of Pillow's own"
    monkeypatch.setitem(Image.OPEN, "STRIPS", (lambda file, name: None, None))
    assert everything(open_source(tmp_path)).keys() == {"1.jpg", "2.strips"}
    assert contents


def test_links_to_nowhere_are_told(tmp_path: Path) -> None:
    write(tmp_path, ["a/1.jpg", ".hidden/x.jpg"])
    for link in ("a/2.jpg", "a/3.txt", ".hidden/4.jpg"):
        (tmp_path / link).symlink_to("/nowhere.jpg")
    (tmp_path / "5.jpg").symlink_to("a/1.jpg")
    found = everything(open_source(tmp_path))
    assert list(found) == ["5.jpg", "a/1.jpg", "a/2.jpg"]
    assert found["a/2.jpg"] == Unreadable("missing", "a link that leads nowhere")
    assert found["5.jpg"] == b"content of a/1.jpg"
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "1.tar").symlink_to("/nowhere.tar")
    with pytest.raises(StoreError, match=r"must hold its files; '1\.tar' is a link that leads nowhere"):
        open_source(tmp_path / "shards")


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ["images/1.jpg"])
    monkeypatch.chdir(tmp_path)
    assert open_source("images").describe()["path"] == str(tmp_path / "images")


def test_globs(tmp_path: Path) -> None:
    write(tmp_path, ["train/a/1.jpg", "train/a/2.png", "train/3.jpg", "val/4.jpg"])
    cases = {
        "train/**/*.jpg": {"3.jpg", "a/1.jpg"},
        "*/*.jpg": {"train/3.jpg", "val/4.jpg"},
        "train/a/[12].*": {"1.jpg", "2.png"},
        "train/a/[!1].???": {"2.png"},
        "val/4.jpg": {"4.jpg"},
        "**/*.{JPG,png}": {"a/1.jpg", "a/2.png", "3.jpg", "val/4.jpg"},
        "{train/{a,b},val}/*.jpg": {"a/1.jpg", "val/4.jpg"},
        "train/*.JpG": {"3.jpg"},
    }
    for pattern, ids in cases.items():
        found = set(everything(open_source(tmp_path / pattern)))
        # Ids are relative to the last folder before the first wildcard.
        assert {id_.removeprefix("train/") for id_ in found} == {id_.removeprefix("train/") for id_ in ids}, pattern


def test_matches_is_exact() -> None:
    assert matches("a*.jpg", "ab.jpg")
    assert not matches("a*.jpg", "a/b.jpg")
    assert not matches("a.jpg", "abjpg")
    assert matches("**/x", "x")
    assert matches("**/x", "a/b/x")
    assert matches("a{b,c}*.[jJ]pg", "ac1.JPG")
    assert not matches("A*.jpg", "a.jpg"), "but for extensions, names are exact"
    assert matches("v1.0/*", "v1.0/x")
    assert matches("[a.b]*", "b.jpg")
    assert not matches("{a", "a")
    assert matches("{a", "{a")


def test_a_folder_with_brackets_in_its_name_is_that_folder(tmp_path: Path) -> None:
    write(tmp_path, ["set [1]/x.jpg"])
    assert list(everything(open_source(tmp_path / "set [1]"))) == ["x.jpg"]
    write(tmp_path, ["set {a,b}/sub [2]/y.jpg", "set a/z.jpg", "set 1/1.jpg"])
    for pattern, ids in {
        "set [1]/*.jpg": ["x.jpg"],
        "set {a,b}/**/*.{jpg,png}": ["sub [2]/y.jpg"],
        "set {a,b}/sub [2]/*": ["y.jpg"],
        "set [0-9]/*.jpg": ["set 1/1.jpg"],
    }.items():
        assert list(everything(open_source(tmp_path / pattern))) == ids, pattern
    with pytest.raises(StoreError, match=r"source must exist; there is nothing at .*typo\.jpg"):
        open_source(tmp_path / "set [1]" / "typo.jpg")


def test_any_pyarrow_file_system(tmp_path: Path) -> None:
    contents = write(tmp_path / "bucket", ["a/1.jpg", "2.jpg"])
    system = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    assert everything(open_source("bucket", filesystem=system)) == contents


def test_a_file_that_went_away_has_its_reason(tmp_path: Path) -> None:
    write(tmp_path, ["1.jpg", "2.jpg"])
    source = open_source(tmp_path)
    rows = source.rows()
    (tmp_path / "1.jpg").unlink()
    first, second = (content for _, content in source.read(rows))
    assert isinstance(first, Unreadable)
    assert first.kind == "missing"
    assert second == b"content of 2.jpg"


def test_a_pipe_is_no_image_and_is_not_opened(tmp_path: Path) -> None:
    write(tmp_path, ["1.jpg"])
    os.mkfifo(tmp_path / "2.jpg")  # to open it would wait for a writer
    found = everything(open_source(tmp_path))
    assert found["1.jpg"] == b"content of 1.jpg"
    assert isinstance(found["2.jpg"], Unreadable)
    assert found["2.jpg"].kind == "not an image"


def test_one_form_at_a_time(tmp_path: Path) -> None:
    write(tmp_path, ["a.tar", "b.tar.gz"])
    with pytest.raises(StoreError, match=r"uncompressed .tar shards.*got 'b.tar.gz'"):
        open_source(tmp_path)
    write(tmp_path, ["c.parquet"])
    with pytest.raises(StoreError, match=r"has both .parquet and .tar files: choose with a glob"):
        open_source(tmp_path)
    with pytest.raises(StoreError, match=r"glob whose brackets hold characters; got '\[z-a\]\*'"):
        open_source(tmp_path / "[z-a]*")


@pytest.mark.parametrize("other", ["data/train.parquet", "data/0.tar", "data/0.tar.gz", "data/damaged.parquet"])
def test_images_beside_archives_of_images_are_not_taken_for_the_data_set(other: str, tmp_path: Path) -> None:
    write(tmp_path, ["assets/logo.png", other])
    if other == "data/train.parquet":
        pq.write_table(pa.table({"image": [b"x"], "key": ["x"]}), tmp_path / other)
    with pytest.raises(StoreError, match=r"has both image and \.(tar|parquet) files: choose with a glob, such as"):
        open_source(tmp_path)
    assert everything(open_source(tmp_path / "**" / "*.{jpg,png}")).keys() == {"assets/logo.png"}
    if other == "data/train.parquet":
        assert everything(open_source(tmp_path / "**" / "*.parquet")).keys() == {"x"}
        with pytest.raises(StoreError, match="in one form"):
            open_source(tmp_path, image_column="image")


@pytest.mark.parametrize("name", ["0.parquet", "0.tar", "labels.tar"])
def test_files_without_an_image_are_a_source_without_one(name: str, tmp_path: Path) -> None:
    if name == "0.parquet":
        empty = pa.table({"image": pa.array([], pa.binary()), "id": pa.array([], pa.string())})
        pq.write_table(empty, tmp_path / name)
    else:
        with tarfile.open(tmp_path / name, "w") as archive:
            if name == "labels.tar":
                add(archive, "labels/1.txt", b"1")
    with pytest.raises(StoreError, match=rf"source must hold images; the files of '{tmp_path}' have none"):
        ListedBlocks(open_source(tmp_path), Folder.at(tmp_path / "out"), resumed=False)
    assert not (tmp_path / "out").exists()


def test_a_source_is_read_on_without_being_listed_again(tmp_path: Path) -> None:
    contents = write(tmp_path / "files", ["1.jpg", "a/2.jpg"])
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        add(archive, "3.jpg", b"three")
    pq.write_table(pa.table({"key": ["k"], "jpg": [b"bytes"]}), tmp_path / "p.parquet")
    for path, expected in ((tmp_path / "files", contents), (tmp_path / "s.tar", {"3": b"three"})):
        source = open_source(path)
        again = reopen_source(source.describe(), path)
        assert dict(again.read(source.rows())) == expected
        assert again.describe() == source.describe()
        assert reopen_source(source.describe(), tmp_path / "nope").describe()["path"] == str(tmp_path / "nope")
    source = open_source(tmp_path / "p.parquet")
    again = reopen_source(source.describe(), tmp_path / "p.parquet", id_column="other")
    assert again.describe() == {**source.describe(), "id_column": "other"}
    assert dict(again.read(source.rows())) == {"k": b"bytes"}
    rows = source.rows()
    check_there(again, rows)
    (tmp_path / "p.parquet").unlink()
    with pytest.raises(StoreError, match=r"is its disk mounted\? None of the next 1 files is there"):
        check_there(again, rows)


def test_a_source_that_has_moved_is_read_where_it_lies_now(tmp_path: Path) -> None:
    contents = write(tmp_path / "before", ["1.jpg", "a/2.jpg"])
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        add(archive, "3.jpg", b"three")
    for place, expected in (("before", contents), ("s.tar", {"3": b"three"})):
        source = open_source(tmp_path / place)
        rows = source.rows()
        (tmp_path / place).rename(tmp_path / f"moved-{place}")
        if place == "s.tar":  # a shard keeps its name
            (tmp_path / "other").mkdir()
            (tmp_path / "moved-s.tar").rename(tmp_path / "other" / "s.tar")
        now = tmp_path / "moved-before" if place == "before" else tmp_path / "other"
        again = reopen_source(source.describe(), now, moved=True)
        check_there(again, rows, moved=True)
        assert dict(again.read(rows)) == expected
    (tmp_path / "moved-before" / "a" / "2.jpg").write_bytes(b"of another size")
    source = reopen_source({"kind": "files", "root": "gone"}, tmp_path / "moved-before", moved=True)
    rows = open_source(tmp_path / "moved-before").rows().set_column(3, "size", pa.array([16, 18]))
    with pytest.raises(StoreError, match=r"must hold the same files; .*/a/2.jpg has 15 bytes, and had 18"):
        check_there(source, rows, moved=True)
    check_there(source, rows)


def test_folders_that_hold_one_another(tmp_path: Path) -> None:
    write(tmp_path, ["images/1.jpg", "images/a/2.jpg"])
    for source in (tmp_path / "images", tmp_path / "images" / "*.jpg"):
        with pytest.raises(StoreError, match=r"out must not contain the source's images"):
            open_source(source, exclude=str(tmp_path / "images" if "*" in source.name else tmp_path))
    (tmp_path / "images" / "a" / "up").symlink_to("..")
    with pytest.raises(StoreError, match=r"source must not hold a link to a folder around it; .*a/up leads to"):
        open_source(tmp_path / "images")
    # A circle of several links, none of which leads upwards; and a folder that is linked to twice, which is not one.
    write(tmp_path, ["circle/a/1.jpg", "circle/b/2.jpg", "twice/a/1.jpg"])
    (tmp_path / "circle" / "a" / "l").symlink_to("../b")
    (tmp_path / "circle" / "b" / "m").symlink_to("../a")
    with pytest.raises(StoreError, match=r"a link to a folder around it; .*circle/(a/l/m|b/m/l) leads to"):
        open_source(tmp_path / "circle")
    (tmp_path / "twice" / "b").symlink_to("a")
    (tmp_path / "twice" / "self.jpg").symlink_to("self.jpg")
    found = everything(open_source(tmp_path / "twice"))
    assert found.pop("self.jpg") == Unreadable("missing", "a link that leads nowhere")
    assert found.keys() == {"a/1.jpg", "b/1.jpg"}


def test_cells_that_are_no_images_or_no_keys(tmp_path: Path) -> None:
    keys = pa.array(["a", "b"]).dictionary_encode()
    pq.write_table(pa.table({"id": keys, "image": [b"x", None]}), tmp_path / "a.parquet")
    found = everything(open_source(tmp_path))
    assert found.pop("a") == b"x"
    assert found["b"].kind == "missing"  # type: ignore[attr-defined]
    pq.write_table(pa.table({"id": ["a", None], "image": [b"x", b"y"]}), tmp_path / "a.parquet")
    with pytest.raises(StoreError, match=r"id_column must name a column with a key in each row; 'id' has a"):
        open_source(tmp_path).rows()


@pytest.mark.parametrize("form", ["binary", "struct"])
def test_parquet_with_image_bytes(form: str, tmp_path: Path) -> None:
    expected: dict[str, object] = {}
    for file in range(2):
        ids = [file * 100 + number for number in range(50)]
        values: list[object] = [f"image {id_}".encode() for id_ in ids]
        expected |= {str(id_): value for id_, value in zip(ids, values, strict=True)}
        if form == "struct":
            values = [{"bytes": value, "path": "x"} for value in values]
        table = pa.table({"label": list(range(50)), "image": values, "id": ids})
        pq.write_table(table, tmp_path / f"{file}.parquet", row_group_size=20)
    assert everything(open_source(tmp_path)) == expected
    by_row = everything(open_source(tmp_path / "1.parquet", id_column="#row"))
    assert by_row["1.parquet#49"] == b"image 149"


@pytest.mark.parametrize("typed", [True, False])
def test_parquet_rows_may_name_files_in_place_of_bytes(typed: bool, tmp_path: Path) -> None:
    write(tmp_path, ["set/images/1.jpg", "elsewhere/2.jpg"])
    paths = ["images/1.jpg", str(tmp_path / "elsewhere" / "2.jpg"), (tmp_path / "elsewhere" / "2.jpg").as_uri()]
    paths += ["images/nope.jpg", "ftp://x/1.jpg"]
    cells: list[dict[str, object]] = [{"bytes": None, "path": path} for path in paths]
    kind = pa.struct([("bytes", pa.binary() if typed else pa.null()), ("path", pa.string())])
    if typed:
        cells.append({"bytes": b"its own", "path": "images/1.jpg"})
    cells.append({"bytes": None, "path": None})
    table = pa.table({"image": pa.array(cells, kind)})
    (tmp_path / "set" / "data").mkdir()
    pq.write_table(table, tmp_path / "set" / "all.parquet")
    found = list(everything(open_source(tmp_path / "set" / "*.parquet")).values())
    assert found[:3] == [b"content of set/images/1.jpg", *[b"content of elsewhere/2.jpg"] * 2]
    assert found[5:-1] == ([b"its own"] if typed else [])
    kinds = [content.kind for content in (found[3], found[4], found[-1])]  # type: ignore[attr-defined]
    assert kinds == ["missing", "unsupported", "missing"]


def test_rows_without_a_place_cannot_name_relative_files() -> None:
    content = content_of({"bytes": None, "path": "images/1.jpg"})
    assert isinstance(content, Unreadable)
    assert "its path is relative to no known place: images/1.jpg" in content.detail


def test_parquet_blocks_need_not_begin_at_row_groups(tmp_path: Path) -> None:
    table = pa.table({"id": [str(n) for n in range(100)], "bytes": [bytes([n]) for n in range(100)]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=40)
    source = open_source(tmp_path)
    rows = source.rows()
    for start, stop in [(0, 7), (35, 45), (17, 99), (80, 100)]:
        pieces = source.slices(rows.slice(start, stop - start))
        found = [pair for piece in pieces for pair in source.read(piece)]
        assert found == [(str(n), bytes([n])) for n in range(start, stop)]


def test_parquet_columns_that_leave_a_doubt(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"left": [b"a"], "right": [b"b"], "id": ["1"]}), path)
    with pytest.raises(StoreError, match=r"image_column must name the column.*'left', 'right', 'id'"):
        open_source(path)
    assert everything(open_source(path, image_column="right")) == {"1": b"b"}
    with pytest.raises(StoreError, match="id_column must name a column that fits; got 'nope'"):
        open_source(path, image_column="left", id_column="nope")
    pq.write_table(pa.table({"image": [b"a", None], "id": ["1", "1"]}), path)
    with pytest.raises(StoreError, match=r"'1' occurs twice \(name another id_column"):
        open_source(path).rows()
    rows = everything(open_source(path, id_column="#row"))
    assert isinstance(rows["x.parquet#1"], Unreadable)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="source must exist"):
        open_source(tmp_path / "nope")
    with pytest.raises(StoreError, match="no file is there"):
        open_source(tmp_path / "*.jpg")
    with pytest.raises(StoreError, match="no pyarrow file system takes 'ftp://x/y'"):
        open_source("ftp://x/y")


@pytest.mark.slow
def test_damaged_parquet_costs_its_own_rows_and_says_so(tmp_path: Path) -> None:
    cells = [bytes([index]) * 4000 for index in range(40)]
    table = pa.table({"id": [str(index) for index in range(40)], "image": cells})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10, compression="zstd", use_dictionary=False)
    chunk = pq.read_metadata(tmp_path / "a.parquet").row_group(2).column(1)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 8] = b"\xff" * 8
    (tmp_path / "a.parquet").write_bytes(data)
    (tmp_path / "b.parquet").write_bytes(data[:3000])  # without its end, where Parquet has its contents
    (tmp_path / "c.parquet").write_bytes(b"")
    found = everything(open_source(tmp_path))
    assert list(found) == [*map(str, range(40)), "b.parquet", "c.parquet"]
    lost = {id_ for id_, content in found.items() if isinstance(content, Unreadable)}
    assert lost == {*map(str, range(20, 30)), "b.parquet", "c.parquet"}
    assert all(found[str(index)] == cells[index] for index in range(40) if str(index) not in lost)
    assert {found[id_].kind for id_ in lost} == {"corrupt"}  # type: ignore[attr-defined]
    assert "a.parquet, row group 2: " in found["20"].detail  # type: ignore[attr-defined]


def test_parquet_files_that_differ_in_their_columns_are_told_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["1"], "image": [b"x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": ["2"], "picture": [b"x"]}), tmp_path / "b.parquet")
    with pytest.raises(StoreError, match=r"image_column must name a column of each file; b.parquet has no 'image'"):
        open_source(tmp_path).rows()
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(StoreError, match=r"a.parquet cannot be opened"):
        open_source(tmp_path)


def test_a_name_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    write(tmp_path, ["a.jpg"])
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))).write_bytes(b"x")
    with pytest.raises(StoreError, match=r"names of files must be UTF-8, since ids are made of them; rename"):
        open_source(tmp_path)
