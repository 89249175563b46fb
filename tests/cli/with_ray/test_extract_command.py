"""``dinov3-ray extract``, and ``dinov3-ray show`` of what it stored, as a user types them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import run_command as run
from PIL import Image
from torch import Tensor
from waiting import until

from dinov3_ray import TeacherPool
from dinov3_ray.config import DinoV3Config
from dinov3_ray.datasets import FeatureStore, TargetDataset
from dinov3_ray.errors import StoreError
from dinov3_ray.features import FeatureSpec
from dinov3_ray.model import DinoV3Teacher
from dinov3_ray.testing import FakeTeacher


@pytest.fixture(scope="module")
def extracted(folder: Path, tiny_checkpoint: Path, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stores") / "out"
    options = ["--outputs", "cls,map", "--layers", "0,-1", "--map-size", "7x9", "--dtype", "float16"]
    options += ["--compute-dtype", "float32", "--image-size", "64", "--address", ray_cluster, "--threads", "1"]
    result = run("extract", folder, out, "--root", tiny_checkpoint, *options)
    assert result.exit_code == 0, result.output
    assert "6 rows" in result.output
    assert "1 errors\n  not an image: 1\n" in result.output
    assert str(out / "errors.parquet") in result.output
    assert "7 images, " in result.output  # the forecast
    return out


def test_extract_stores_what_was_asked_for(extracted: Path, tiny_checkpoint: Path, photographs: list[Tensor]) -> None:
    store = FeatureStore(extracted)
    spec = FeatureSpec(cls=True, feature_map=True, layers=(0, -1), map_size=(7, 9), dtype="float16")
    assert store.spec == spec
    local = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64)).extract(photographs[2], spec)
    for (_, stored), (_, expected) in zip(store["2.png"].named(), local.named(), strict=True):
        assert stored.dtype == torch.float16
        torch.testing.assert_close(stored, expected, rtol=2e-3, atol=2e-3)


def test_show_pictures_a_stored_map_beside_its_image(extracted: Path, tmp_path: Path) -> None:
    for options in ([], ["--layer", "-1"]):
        picture = tmp_path / "x.png"
        result = run("show", extracted, "2.png", "--to", picture, *options)
        assert result.exit_code == 0, result.output
        assert result.output.strip() == str(picture)
        with Image.open(picture) as image:
            assert image.width > 900  # two panels
            assert len(set(image.convert("RGB").getdata())) > 50
    result = run("show", extracted, "2.png", "--to", tmp_path / "x.mp3")
    assert result.exit_code == 1
    assert "path must be that of a picture that can be written" in result.output
    result = run("show", extracted, "2.png", "--to", tmp_path / "nowhere" / "x.png")
    assert "path must be that of a picture that can be written" in result.output
    result = run("show", extracted, "broken.jpg")
    assert result.exit_code == 1
    assert "could not be read (not an image)" in result.output
    result = run("show", extracted, "2.png", "--layer", "5")
    assert "the store has no such map; it has: feature_map, layers.0, layers.-1" in result.output


def test_targets_come_with_the_images_that_they_were_made_of(
    extracted: Path, folder: Path, photographs: list[Tensor]
) -> None:
    dataset = TargetDataset(FeatureStore(extracted))
    pixels, features = dataset[2]
    assert np.array_equal(pixels, photographs[2].numpy())
    assert torch.equal(features.cls, dataset.store["2.png"].cls)
    images, batch = TargetDataset.collate([dataset[0], dataset[1]])
    assert torch.equal(images[1], photographs[1])
    assert len(batch) == 2
    path = folder / "2.png"
    before = path.read_bytes()
    path.write_bytes((folder / "1.png").read_bytes())
    try:
        with pytest.raises(
            StoreError,
            match=r"image '2\.png' in .* is not the one whose .* its pixels have changed",
        ):
            dataset[2]
    finally:
        path.write_bytes(before)


def test_too_many_errors_are_a_failure(folder: Path, tiny_checkpoint: Path, ray_cluster: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("extract", folder, out, "--root", tiny_checkpoint, "--max-errors", "0.1", "--address", ray_cluster)
    assert result.exit_code == 1
    assert "at most 10.00% of the images may be errors (max_errors); 1 of 7" in " ".join(result.output.split())


@pytest.mark.slow
def test_a_schedulers_sigterm_leaves_what_is_whole(ray_cluster: str, tmp_path: Path) -> None:
    source, out = tmp_path / "images", tmp_path / "out"
    source.mkdir()
    Image.new("RGB", (32, 32), "teal").save(tmp_path / "image.png")
    for number in range(60):
        (source / f"{number:02}.png").symlink_to(tmp_path / "image.png")
    command = ["extract", source, out, "--pool", "slow", "--batch-size", "1", "--block-size", "1"]
    command += ["--address", ray_cluster]

    def finished() -> dict[str, int]:
        return {entry.name: entry.stat().st_mtime_ns for entry in (out / "ledger").glob("*.json")}

    # All of it would take 12 s, and it is ended after two blocks.
    with TeacherPool.start(FakeTeacher.factory(delay=0.2), name="slow", replicas=1) as pool:
        words = [sys.executable, "-m", "dinov3_ray", *map(str, command)]
        with subprocess.Popen(words, text=True, stderr=subprocess.PIPE) as process:
            until(lambda: len(finished()) >= 2 or process.poll() is not None, "blocks are finished")
            process.terminate()
            _, said = process.communicate(timeout=60)
        assert process.returncode == 143, (len(finished()), said)
        assert f"interrupted: finished blocks stay in {out}" in said
        kept = finished()
        assert 2 <= len(kept) < 60
        pool.reload(FakeTeacher.factory())
        result = run(*command)
    assert result.exit_code == 0, result.output
    assert "60 rows" in result.output
    after = finished()
    assert {name: after[name] for name in kept} == kept, "what was whole is not computed again"
