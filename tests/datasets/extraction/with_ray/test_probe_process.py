"""A teacher that is probed while Ray starts, in a real process: what it finds, and what its end means."""

from __future__ import annotations

import pickle
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor

from dinov3_ray.config import DinoV3Config
from dinov3_ray.datasets import Resources, SourceOptions
from dinov3_ray.datasets.extraction import probe_process, run
from dinov3_ray.datasets.extraction.blocks import open_blocks
from dinov3_ray.datasets.extraction.extract import extract
from dinov3_ray.datasets.extraction.probe_process import EarlyProbe, probe_on_ray
from dinov3_ray.datasets.extraction.resources import allocate
from dinov3_ray.datasets.extraction.teacher_choice import TeacherChoice
from dinov3_ray.datasets.folder import Folder
from dinov3_ray.datasets.sources.piece import Piece
from dinov3_ray.errors import CheckpointError
from dinov3_ray.features import FeatureSpec
from dinov3_ray.pool.spec import pickle_teacher

SPEC = FeatureSpec(cls=True, feature_map=True, dtype="float16")
DECODER = SourceOptions().decoder()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, photographs: list[Tensor]) -> Path:
    """The first one cannot be read; the second, a photograph of 427 x 640 pixels, can."""
    root = tmp_path_factory.mktemp("images")
    (root / "0.jpg").write_bytes(b"no image")
    for index, photograph in enumerate(photographs[3:5], start=1):
        Image.fromarray(photograph.permute(1, 2, 0).numpy()).save(root / f"{index}.png")
    return root


@pytest.fixture
def pieces(images: Path, tmp_path: Path) -> list[Piece]:
    return open_blocks(images, SourceOptions(), Folder.at(tmp_path / "out"), None).first()


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> DinoV3Config:
    return DinoV3Config(tiny_checkpoint, image_size="input", dtype="float32")


def test_it_finds_what_a_probe_on_ray_finds(
    config: DinoV3Config,
    pieces: list[Piece],
    ray_cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(probe_process, "_PATIENCE_SECONDS", 0.0)
    # As in a notebook, whose path may hold entries that are not text.
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    pickled = pickle_teacher(config)
    with closing(EarlyProbe(pickled, SPEC, pieces, DECODER, threads=1)) as early:
        found = early.result()
        assert early.result() == found, "as often as it is asked"
    assert "the first teacher is not ready after 0 s: it takes long to load, or to compile" in caplog.text
    choice = TeacherChoice(pickled, None, num_gpus=0.0, threads=1, passes=1)
    expected = probe_on_ray(choice, SPEC, pieces, DECODER, allocate({"CPU": 2}, 1))
    assert found == expected
    assert expected.outputs["feature_map"] == {"dtype": "<f2", "shape": [128, 26, 40]}, "of the image that can be read"


def test_close_ends_its_process(config: DinoV3Config, pieces: list[Piece]) -> None:
    early = EarlyProbe(pickle_teacher(config), SPEC, pieces, DECODER)
    assert early._process.poll() is None
    early.close()
    assert early._process.wait(10) == -9
    assert early.result() is None


def test_an_extraction_takes_it_or_asks_on_ray(
    config: DinoV3Config, images: Path, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(extract.__globals__, "starts_ray", lambda _address: True)  # it is there already
    asked: list[object] = []

    def on_ray(*arguments: object) -> object:
        asked.append(arguments)
        return probe_on_ray(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "probe_on_ray", on_ray)
    early = extract(images, tmp_path / "early", config, SPEC, resources=Resources(num_gpus=0))
    assert not asked
    assert extract(images, tmp_path / "early", config, SPEC, resources=Resources(num_gpus=0)).blocks == 0, "resumed"
    assert not asked
    monkeypatch.setattr(sys, "executable", "/bin/false")
    late = extract(images, tmp_path / "late", config, SPEC, resources=Resources(num_gpus=0))
    assert len(asked) == 1
    assert (early.images, early.forecast.images) == (late.images, late.forecast.images) == (3, 3)
    assert early.manifest is not None
    assert late.manifest is not None
    for key in ("fingerprint", "outputs", "preprocessing", "rows", "errors", "bytes", "computed_in"):
        assert early.manifest[key] == late.manifest[key]


def test_what_is_wrong_with_a_teacher_is_told_as_ever(
    config: DinoV3Config,
    images: Path,
    ray_cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(extract.__globals__, "starts_ray", lambda _address: True)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in config.root.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[: 1000 if path.suffix == ".safetensors" else None])
    broken_config = replace(config, root=broken)
    with caplog.at_level("DEBUG", "dinov3_ray"), pytest.raises(CheckpointError, match=r"model\.safetensors"):
        extract(images, tmp_path / "out", broken_config, SPEC, resources=Resources(num_gpus=0))
    assert "the early probe failed (exit code 1, EOFError)" in caplog.text


@pytest.mark.parametrize("printed", ["welcome", "", "cos\nsystem\n"], ids=["words", "nothing", "half a pickle"])
def test_an_answer_that_is_none_is_no_fault_of_the_run(
    printed: str, config: DinoV3Config, pieces: list[Piece], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat >/dev/null\nprintf '{printed}'\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with closing(EarlyProbe(pickle_teacher(config), SPEC, pieces, DECODER)) as early:
        assert early.result() is None


def test_what_is_asked_is_small_though_the_listing_is_long(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for index in range(2000):
        (root / f"{index:0100}.jpg").touch()
    first = open_blocks(root, SourceOptions(), Folder.at(tmp_path / "out"), None).first()
    assert len(first) == 8
    assert len(pickle.dumps(first)) < 20_000
