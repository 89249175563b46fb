"""``bench teacher`` gives each mode the same work, and its report says so; what it measures is not tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import run_bench

from dinov3_ray import DinoV3Config
from dinov3_ray.bench import teacher_modes
from dinov3_ray.bench.teacher_modes import TEACHER_SPEC, TeacherWork, modes_for, through_pipeline
from dinov3_ray.bench.teacher_speed import flops_per_image
from dinov3_ray.config.variants import VARIANTS


@pytest.mark.parametrize(
    ("variant", "tera"),
    [("vits16", 0.064), ("vitb16", 0.215), ("vitl16", 0.727), ("vith16plus", 1.90), ("vit7b16", 14.5)],
)
def test_the_cost_of_an_image_at_1024_patches(variant: str, tera: float) -> None:
    assert flops_per_image(VARIANTS[variant], (512, 512)) / 1e12 == pytest.approx(tera, rel=0.01)


def test_the_cost_of_a_convnext_is_the_papers() -> None:
    # 4.46 G multiply-adds at 224 px (Liu et al. 2022, table 9).
    assert flops_per_image(VARIANTS["convnext-tiny"], (224, 224)) / 2e9 == pytest.approx(4.46, rel=0.01)


@pytest.fixture
def fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies bfloat16, as far as the choice of modes goes: the tests' model is small."""
    monkeypatch.setattr(teacher_modes, "choose_dtype", lambda *_: (torch.bfloat16, "in hardware"))


@pytest.mark.slow
@pytest.mark.usefixtures("fast_bfloat16")
def test_quick_run(tiny_checkpoint: Path) -> None:
    options = ["--root", str(tiny_checkpoint), "--image-size", "32", "--batch", "2", "--quick"]
    report: dict[str, Any] = run_bench("teacher", *options, "--target-rate", "1e6")
    assert (report["model"], report["batch"], report["image_size"]) == ("vit-test", 2, [32, 32])
    assert report["flops"] == flops_per_image(VARIANTS["vit-test"], (32, 32))
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["transformers float32 (its default)"]["ratio"] == 1.0
    assert rows["float32"]["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert all(row["cosine"] > 0.9999 for row in report["rows"][1:])
    best = max(row["images_per_second"] for row in report["rows"] if row["ours"])
    assert report["replicas_needed"] == {"1000000.0": pytest.approx(1e6 / best, abs=1)}
    assert report["copies"] is None


@pytest.mark.slow
@pytest.mark.usefixtures("fast_bfloat16")
def test_a_run_at_the_size_of_the_images(tiny_checkpoint: Path) -> None:
    options = ["--root", str(tiny_checkpoint), "--image-size", "input/2", "--view", "64x100", "--batch", "2", "--quick"]
    report: dict[str, Any] = run_bench("teacher", *options)
    assert report["image_size"] == [32, 48]
    assert all(row["missing"] is None for row in report["rows"])
    assert all(row["cosine"] > 0.9999 for row in report["rows"][1:])


@pytest.mark.slow
def test_bfloat16_that_torch_emulates_is_left_out_with_the_reason(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_modes, "choose_dtype", lambda *_: (torch.float32, "no such hardware"))
    options = ["--root", str(tiny_checkpoint), "--image-size", "32", "--batch", "2", "--quick"]
    report: dict[str, Any] = run_bench("teacher", *options)
    missing = {row["name"]: row["missing"] for row in report["rows"] if row["missing"]}
    assert {"transformers bfloat16", "bfloat16"} <= missing.keys()
    assert set(missing.values()) == {"torch emulates bfloat16 on this CPU"}
    measured = {row["name"] for row in report["rows"] if not row["missing"]}
    assert {"transformers float32 (its default)", "float32"} <= measured
    assert {row["dtype"] for row in report["rows"] if not row["missing"]} == {"float32"}, "by OpenVINO, too"


@pytest.mark.slow
@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize(
    ("size", "view"), [((32, 48), None), ("input", (45, 50)), ("input/2", (64, 100))], ids=["fixed", "input", "input/2"]
)
def test_every_mode_delivers_the_same_shapes(tiny_checkpoint: Path, size: Any, view: tuple[int, int] | None) -> None:
    work = TeacherWork(DinoV3Config(tiny_checkpoint, image_size=size), torch.device("cpu"), batch=2, view=view)
    for mode in modes_for(work.device, quick=True):
        extract = mode.make(work)
        shapes = {name: tensor.shape for name, tensor in extract(work.images()).named()}
        assert shapes == {"cls": (2, 128), "feature_map": (2, 128, 2, 3)}, mode.name
    through_pipeline(extract, work, batches=5)()
    assert TEACHER_SPEC.cls
    assert TEACHER_SPEC.feature_map
