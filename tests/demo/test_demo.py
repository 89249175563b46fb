"""The parts of the demonstration that need no Ray, and the mistakes that it reports before it starts one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from commandline import run_command
from torch import Tensor

from dinov3_ray.demo.ephemeral_ray import gpus_per_replica
from dinov3_ray.demo.photographs import read_photographs
from dinov3_ray.demo.views import Views
from dinov3_ray.distillation.augmentation import crop_centre


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", "nowhere"], "--images must be a folder of photographs; nowhere is missing"),
        (["--root", "nowhere"], "root must be a model directory"),
        (["--images", "empty"], "--images must hold image files"),
        (["--trained", "--images", "broken"], "--trained has a teacher of its own, .* leave out --images; got broken"),
        (["--trained", "--root", "mine"], "--trained has a teacher of its own, .* leave out --root; got mine"),
        (["--images", "broken"], r"bad\.jpg \(not an image\)"),
        (["--out", "empty/../broken/bad.jpg/out"], "--out must be a folder that can be written"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bad.jpg").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    result = run_command("demo", *arguments)
    assert result.exit_code == 1
    assert re.search(words, result.output)
    assert result.output.splitlines()[-1].startswith("Error: ")
    assert isinstance(result.exception, SystemExit)  # reported, not raised through


def test_photographs_come_upright_in_order_and_reduced(photograph_folder: Path, photographs: list[Tensor]) -> None:
    read = read_photographs(photograph_folder, at_most=4, shorter_side=100)
    assert [min(picture.shape[1:]) for picture in read.pictures] == [100, 100, 100]
    assert read.pictures[1].shape[2] == round(photographs[2].shape[2] * 100 / photographs[2].shape[1])
    assert [line.split(" ")[0] for line in read.skipped] == ["broken.png"]


def test_views_repeat_exactly_and_differ_from_each_other(photographs: list[Tensor]) -> None:
    views = Views(photographs, (64, 96), batch=4, steps=3, seed=5)
    first, again = list(views), list(views)
    assert len(first) == len(views) == 3
    assert all(batch.shape == (4, 3, 64, 96) and batch.dtype == torch.uint8 for batch in first)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    flat = torch.cat(first).flatten(1)
    assert len(flat.unique(dim=0)) == 12
    other = next(iter(Views(photographs, (64, 96), batch=4, steps=1, seed=6)))
    assert not torch.equal(other, first[0])


def test_every_picture_is_seen_before_any_is_seen_again() -> None:
    pictures = [torch.full((3, 40, 40), 40 * value, dtype=torch.uint8) for value in range(1, 6)]
    seen = torch.cat(list(Views(pictures, (16, 16), batch=5, steps=2, seed=0))).float().mean((1, 2, 3))
    for epoch in seen.split(5):  # brightness alone tells them apart, by rank: it is scaled by at most a fifth
        assert sorted(round(value / 40) for value in epoch.tolist())[0] <= 1
        assert epoch.max() > 3 * epoch.min()


def test_the_centre_of_a_picture_that_fits_is_the_picture(photographs: list[Tensor]) -> None:
    picture = photographs[0]
    assert torch.equal(crop_centre(picture, (picture.shape[1], picture.shape[2])), picture)


@pytest.mark.parametrize(
    ("replicas", "free", "share"), [(2, 0, 0), (2, 0.5, 0), (2, 1, 0.5), (2, 2, 1), (3, 2, 0.5), (3, 1, 0.3333)]
)
def test_all_replicas_find_room_on_the_gpus_that_are_free(replicas: int, free: float, share: float) -> None:
    assert gpus_per_replica(replicas, free) == share
    assert replicas * share <= max(free, 0)
