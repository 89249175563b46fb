"""Mistakes that ``dinov3-ray distill`` reports before it starts Ray, and names the remedy of."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import ray
from click.testing import Result
from commandline import run_command
from PIL import Image
from students import small

from dinov3_ray.distillation.job import DistillSummary
from dinov3_ray.distillation.run_folder import RUN, SUMMARY, RunFolder
from dinov3_ray.distillation.student_backbone import PLAIN, StudentBackbone


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
        (["--image-size", "8"], "image_size must be at least 16 px high and wide"),
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


def distill(images: Path, out: Path, root: Path, *arguments: object) -> Result:
    options = ["--root", root, "--student", "students:pyramid", "--image-size", 64, "--epochs", 1, "--device", "cpu"]
    return run_command("distill", images, out, *options, *arguments)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    folder = tmp_path / "classes"
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
    return folder


def test_a_run_of_another_student_or_of_other_labelled_images_is_refused_before_anything_starts(
    images: Path, classes: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    folder = RunFolder(out)
    out.mkdir()
    folder.write_json(RUN, {})
    was = ray.is_initialized()
    before = {"folder": "flowers", "images": 9, "listing": "x"}
    folder.save(
        {"student": StudentBackbone(small(), statistics=PLAIN, size=(64, 64)).state_dict(), "scored_on": before}
    )
    refused = distill(images, out, tiny_checkpoint)
    assert refused.exit_code == 1
    assert "student 'students:pyramid' is no longer that of" in refused.output
    assert "Missing key(s)" in refused.output
    refused = distill(images, out, tiny_checkpoint, "--evaluate", classes)
    assert refused.exit_code == 1
    assert f"scored on before, flowers (9 images), as it was then; got {classes} (4 images)" in refused.output
    assert ray.is_initialized() == was


def test_a_finished_run_shows_what_it_gave_and_is_not_scored_without_a_checkpoint(
    images: Path, classes: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    texts = dict.fromkeys(("teacher", "student", "framework", "recipe", "weights", "usage"), "text")
    summary = DistillSummary(
        **texts,
        fingerprint=None,
        mean=(),
        std=(),
        images=1,
        unreadable={},
        steps=1,
        batch=64,
        first_loss=0.5,
        last_loss=0.5,
        seconds=1.0,
    )
    RunFolder(out).write_json(RUN, {})
    RunFolder(out).write_json(SUMMARY, asdict(summary))
    shown = distill(images, out, tiny_checkpoint)
    assert shown.exit_code == 0
    assert "is finished: nothing is done again" in shown.output
    assert "loss      0.5000 (1 step of 64)" in shown.output
    refused = distill(images, out, tiny_checkpoint, "--evaluate", classes)
    assert refused.exit_code == 1
    assert "evaluate must be given before a run is finished" in refused.output


def test_a_pool_in_no_ray_is_told_by_the_options_that_name_one(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever ran before in this process
    options = ["--pool", "teaches", "--student", "students:pyramid"]
    refused = run_command("distill", images, images.parent / "out", *options, RAY_ADDRESS=None)
    assert refused.exit_code == 1
    assert "pool 'teaches' is in a Ray that is not named: pass --address HOST:PORT" in refused.output


def test_a_source_without_images_is_told(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "empty").mkdir()
    options = ["--root", tiny_checkpoint, "--student", "students:small"]
    result = run_command("distill", tmp_path / "empty", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert "must hold images" in result.output
