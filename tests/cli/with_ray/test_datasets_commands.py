"""``dinov3-ray extract`` and ``dinov3-ray show``, as a user types them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import run_command as run
from PIL import Image
from torch import Tensor

from dinov3_ray.cli import datasets as commands
from dinov3_ray.config import DinoV3Config
from dinov3_ray.datasets import FeatureStore, TargetDataset
from dinov3_ray.errors import StoreError
from dinov3_ray.features import FeatureSpec
from dinov3_ray.model import DinoV3Teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photographs: list[Tensor]) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for index, photograph in enumerate(photographs):
        Image.fromarray(photograph.permute(1, 2, 0).numpy()).save(root / f"{index}.png")
    (root / "broken.jpg").write_bytes(b"no image")
    return root


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
    assert "there is no such map; these are stored: feature_map, layers.0, layers.-1" in result.output


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
        with pytest.raises(StoreError, match=r"image '2\.png' has changed since its features were extracted"):
            dataset[2]
    finally:
        path.write_bytes(before)


def test_show_pictures_an_image_by_a_model(folder: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    result = run(
        "show", "--image", folder / "1.png", "--root", tiny_checkpoint, "--image-size", "96x128", "--to", picture
    )
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 10_000
    result = run("show", "--image", folder / "broken.jpg", "--root", tiny_checkpoint)
    assert result.exit_code == 1
    assert "cannot be read as an image (not an image)" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "a", "b", "--outputs", "cls,patches"], "must be of cls, map, registers"),
        (["extract", "a", "b", "--layers", "x"], "such as 4,11,-1; got 'x'"),
        (["extract", "a", "b", "--map-size", "3x4x5"], "must be SIZE or HEIGHTxWIDTH"),
        (["extract", "a", "b", "--background", "white"], "must be R,G,B, each from 0 to 255"),
        (["extract", "a", "b", "--pool", "p", "--image-size", "64"], "belong to --root"),
        (["extract", "a", "b"], "exactly one of config and pool must be given"),
        (["show", "a"], "give either OUT and ID, or --image FILE and --root DIR"),
        (["show", "nowhere", "x"], "is not a feature store"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "extract", interrupted)
    result = run("extract", "photographs", "features", "--pool", "p")
    assert result.exit_code == 130
    assert "what is finished stays in features, and the same command goes on" in result.output
