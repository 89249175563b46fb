"""Mistakes that ``dinov3-ray distill`` reports before it starts Ray, and names the remedy of."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from commandline import run_command
from PIL import Image


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (64, 64), (90, 120, 60)).save(folder / "one.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "rtdetrv5"], "recipe must be one of .* got 'rtdetrv5' (did you mean 'rtdetrv4'?)"),
        (["--student", "students:smal"], "it has no 'smal'. Near it: small"),
        (["--student", "students:classifier"], "layers must name the layers to compare"),
        (["--layer", "boddy"], "it has no 'boddy'. Near it: body"),
        (["--pool", "dinov3"], "exactly one of root and pool must be given"),
        (["--steps", "9"], "epochs and steps must not both be given"),
        (["--lr", "0"], "lr must be more than 0"),
        (["--amp", "float16"], "amp must be another than 'float16' on cpu"),
        (["--evaluate", "images"], "one.png lies in none"),
        (["--image-size", "4"], "student must take images [B,3,4,4]"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_starts(
    arguments: list[str],
    words: str,
    images: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    was = ray.is_initialized()
    options = ["--root", tiny_checkpoint, "--student", "students:pyramid", "--image-size", 64, "--epochs", 1]
    result = run_command("distill", images, "out", *options, "--device", "cpu", *arguments)
    assert result.exit_code == 1, result.output
    error = result.output.splitlines()[-1]
    assert error.startswith("Error: ")
    assert all(part in error for part in words.split(".* "))
    assert isinstance(result.exception, SystemExit)  # reported, not raised through
    assert ray.is_initialized() == was
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_source_without_images_is_told(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "empty").mkdir()
    options = ["--root", tiny_checkpoint, "--student", "students:small"]
    result = run_command("distill", tmp_path / "empty", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert "must hold images" in result.output
