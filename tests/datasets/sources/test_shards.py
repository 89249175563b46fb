"""Tar shards: which members are images, which are left out, and what damage leaves."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from sourcefiles import add, everything

from dinov3_ray.datasets.decode import Unreadable
from dinov3_ray.datasets.sources.open import open_source
from dinov3_ray.errors import StoreError


def test_webdataset_shards(tmp_path: Path) -> None:
    expected: dict[str, object] = {}
    for shard in range(2):
        with tarfile.open(tmp_path / f"s-{shard}.tar", "w") as archive:
            for number in range(40):
                content = f"{shard} {number}".encode() * 50
                add(archive, f"{shard}/{number:03}.jpg", content)
                add(archive, f"{shard}/{number:03}.json", b"{}")
                expected[f"{shard}/{number:03}"] = content
            add(archive, f"{shard}/pair.left.png", b"left")
            add(archive, f"{shard}/pair.right.png", b"right")
            expected |= {f"{shard}/pair.left.png": b"left", f"{shard}/pair.right.png": b"right"}
            add(archive, f"{shard}/wordy.txt", b"no image")
    (tmp_path / "README.md").write_text("not an image")
    found = everything(open_source(tmp_path))
    wordy = [found.pop(f"{shard}/wordy") for shard in range(2)]
    assert all(isinstance(content, Unreadable) and content.kind == "missing" for content in wordy)
    assert found == expected


def test_a_cut_shard_gives_what_is_whole_and_says_what_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(10):
            add(archive, f"{number}.jpg", bytes([number]) * 5000)
    path.write_bytes(path.read_bytes()[:30_000])
    found = everything(open_source(path))
    whole = [id_ for id_, content in found.items() if isinstance(content, bytes)]
    troubled = {id_: content.kind for id_, content in found.items() if isinstance(content, Unreadable)}
    assert whole == ["0", "1", "2", "3", "4"]
    assert troubled == {"5": "truncated", "s.tar": "truncated"}


def test_linked_members_have_the_content_that_they_link_to(tmp_path: Path) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "first.jpg").write_bytes(b"content")
    os.link(tmp_path / "set" / "a" / "first.jpg", tmp_path / "set" / "hard.jpg")
    (tmp_path / "set" / "soft.jpg").symlink_to("a/first.jpg")
    (tmp_path / "set" / "away.jpg").symlink_to("/nowhere.jpg")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in ("soft.jpg", "a/first.jpg", "hard.jpg", "away.jpg"):
            archive.add(tmp_path / "set" / name, f"./{name}")
        assert archive.getmember("./hard.jpg").islnk()
    found = everything(open_source(tmp_path / "s.tar"))
    away = found.pop("./away")
    assert found == {f"./{key}": b"content" for key in ("soft", "a/first", "hard")}
    assert isinstance(away, Unreadable)
    assert away.kind == "missing"


def test_shards_have_the_rule_of_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in ("images/1.jpg", "images/._1.jpg", "._images/2.jpg", "labels/1.txt", "data.yaml", ".DS_Store"):
            add(archive, name, name.encode())
        link = tarfile.TarInfo("images/3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "._1.jpg"
        archive.addfile(link)
    with tarfile.open(tmp_path / "1.tar", "w") as archive:
        add(archive, "images/lost.txt", b"a sample whose image is not there")
        add(archive, "./labels/lost.txt", b"x")
    found = everything(open_source(tmp_path))
    lost = found.pop("images/lost")
    assert isinstance(lost, Unreadable)
    assert lost.kind == "missing"
    assert found == {"images/1": b"images/1.jpg", "images/3": b"images/._1.jpg"}
    assert caplog.text.count("left out are files whose names are not those of images: 2 .txt, 1 .yaml") == 1


@pytest.mark.parametrize("damage", ["header", "zeros", "cut before the header", "cut in the header"])
def test_a_shard_that_does_not_end_as_tar_files_do_is_damaged_from_there_on(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(10):
            add(archive, f"{number}.jpg", bytes([number]) * 600)
    offset = 4 * (512 + 1024)  # of the fifth member, each with a header and whole blocks of 512 bytes
    whole = bytearray(path.read_bytes())
    damaged = {
        "header": whole[:offset] + b"\xa5" * 512 + whole[offset + 512 :],
        "zeros": whole[:offset] + bytes(512) + whole[offset + 512 :],
        "cut before the header": whole[:offset],
        "cut in the header": whole[: offset + 100],
    }
    path.write_bytes(damaged[damage])
    found = everything(open_source(path))
    last = found.pop("s.tar")
    assert isinstance(last, Unreadable)
    assert (last.kind, last.detail) == ("truncated", f"the shard is damaged from byte {offset} on")
    assert list(found) == ["0", "1", "2", "3"]


def test_keys_that_start_anew_in_each_shard_get_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for shard in range(2):
        (tmp_path / "train").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "train" / f"{shard}.tar", "w") as archive:
            add(archive, "0000.jpg", f"{shard}".encode())
            add(archive, f"{shard}001.jpg", b"x")
    found = everything(open_source(tmp_path))
    assert found == {"train/0/0000": b"0", "train/0/0001": b"x", "train/1/0000": b"1", "train/1/1001": b"x"}
    assert "keys start anew in some shards; ids are shard/key, such as 'train/0/0000'" in caplog.text


def test_shards_with_one_key_twice_and_compressed_ones_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        add(archive, "same.jpg", b"x")
        add(archive, "same.jpg", b"y")
    with pytest.raises(StoreError, match=r"'s/same\.jpg' occurs twice"):
        open_source(tmp_path).rows()
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "s.tar.gz").write_bytes(b"")
    with pytest.raises(StoreError, match=r"uncompressed \.tar shards.*s\.tar\.gz"):
        open_source(tmp_path / "gz")
