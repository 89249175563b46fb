"""Which view is which step's: by the seed alone, wherever a run begins, and whatever cannot be read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov3_ray.distillation.augmentation import Augmentation
from dinov3_ray.distillation.view_order import Pictures, ViewDataset, view_batches
from dinov3_ray.errors import ConfigError, StoreError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(1, 6):
        (tmp_path / str(number)).mkdir()
        Image.new("RGB", (24, 20), (40 * number,) * 3).save(tmp_path / str(number) / "image.png")
    return tmp_path


def views_of(folder: Path, seed: int = 0) -> ViewDataset:
    return ViewDataset(Pictures.open(folder), Augmentation((16, 16)), seed)


def batches_of(folder: Path, first: int = 0, *, seed: int = 0, workers: int = 0) -> list[Tensor]:
    loader = view_batches(views_of(folder, seed), batch=3, first=first, last=5, workers=workers)
    assert len(loader) == 5 - first
    return [batch["images"] for batch in loader]


def test_a_run_that_begins_later_has_the_views_of_one_that_began_before(folder: Path) -> None:
    whole = batches_of(folder)
    before = torch.get_rng_state()
    later = batches_of(folder, 3, workers=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one, other) for one, other in zip(whole[3:], later, strict=True))
    assert not torch.equal(batches_of(folder, seed=1)[0], whole[0])


def test_each_pass_has_every_picture_once_in_an_order_of_its_own(folder: Path) -> None:
    # Without colours, a view's brightness tells its picture.
    plain = Augmentation((16, 16), brightness=0, contrast=0, saturation=0)
    views = ViewDataset(Pictures.open(folder), plain, 0)
    orders = [[int(views[place + 5 * number][0].float().mean()) // 40 for place in range(5)] for number in range(4)]
    assert all(sorted(order) == [1, 2, 3, 4, 5] for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_what_cannot_be_read_is_told_and_the_next_image_comes_in_its_place(folder: Path) -> None:
    (folder / "3" / "image.png").write_bytes(b"x")
    views = views_of(folder)
    found = [views[position] for position in range(10)]
    told = [unreadable for _, unreadable in found if unreadable]
    assert len(told) == 2  # once in each pass
    assert told[0] == told[1]
    assert told[0]["3/image.png"].startswith("not an image: ")
    assert all(view.shape == (3, 16, 16) and view.dtype == torch.uint8 for view, _ in found)
    for number in (1, 2, 4, 5):
        (folder / str(number) / "image.png").write_bytes(b"")
    with pytest.raises(StoreError, match=r"5 in a row cannot: ./image\.png"):
        views_of(folder)[0]


@pytest.mark.slow
def test_a_moments_failure_ends_the_run_in_its_own_words_and_is_not_remembered(folder: Path) -> None:
    path = folder / "2" / "image.png"
    content = path.read_bytes()
    views = views_of(folder)
    whole = [views[position][0] for position in range(5)]
    path.unlink()
    path.mkdir()  # listed as a file, and cannot be read as one
    with pytest.raises(StoreError, match=r"^2/image\.png is there, but cannot be read: .*same command goes on\)$"):
        list(view_batches(views, batch=5, first=0, last=1, workers=1))
    with pytest.raises(StoreError, match=r"^2/image\.png is there"):
        _ = [views[position] for position in range(5)]
    path.rmdir()
    gone = [views[position][1] for position in range(5)]
    assert [list(names) for names in gone if names] == [["2/image.png"]]
    path.write_bytes(content)
    found = [views[position] for position in range(5)]
    assert all(torch.equal(view, before) and not unread for (view, unread), before in zip(found, whole, strict=True))


def test_images_that_differ_are_another_run(folder: Path) -> None:
    before = Pictures.open(folder).describe()
    assert Pictures.open(folder).describe() == before
    Image.new("RGB", (24, 20)).save(folder / "6.png")
    assert Pictures.open(folder).describe() != before
    assert Pictures.open(folder, exclude=str(folder / "5")).describe()["images"] == 5


def test_parquet_cannot_be_read_in_random_order(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "images.parquet")
    with pytest.raises(ConfigError, match="source must be image files or tar shards"):
        Pictures.open(tmp_path)
