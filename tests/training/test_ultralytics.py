"""The Ultralytics trainers, for real where Ultralytics imports (it needs torchvision), on a tiny oriented data set.

Last run on 2026-11-24 with ultralytics 8.4.190, torch 2.14.1, torchvision 0.29.1, Python 3.11, on a CPU: all pass. By
hand, with the same, Ultralytics' own launch of two ranks over a pool of Ray actors (gloo in place of NCCL, and its
final validation, which asks for CUDA, left out): both ranks ended with the same model and projector. No GPU has
seen it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dinov3_ray import FeatureSpec, TeacherPool
from dinov3_ray.errors import ConfigError
from dinov3_ray.testing import FakeTeacher

ultralytics = pytest.importorskip("ultralytics", exc_type=ImportError)
trainers = pytest.importorskip("dinov3_ray.integrations.ultralytics", exc_type=ImportError)

HEIGHT, WIDTH, IMGSZ = 96, 160, 160


@pytest.fixture
def pool() -> Iterator[TeacherPool]:
    with TeacherPool.start(FakeTeacher.factory(), name="yolo", replicas=1, local_mode=True) as pool:
        yield pool


def dataset(root: Path, oriented: bool) -> Path:
    """Bars on noise, wider than high, so that loaders letterbox them."""
    chance = random.Random(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number in range(4):
            noise = np.random.default_rng(number).integers(60, 120, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            image, lines = Image.fromarray(noise), []
            for _ in range(2):
                x, y = chance.uniform(30, WIDTH - 30), chance.uniform(30, HEIGHT - 30)
                angle = chance.uniform(0, math.pi) if oriented else 0.0
                cos, sin = math.cos(angle), math.sin(angle)
                corners = [
                    (x + a * 18 * cos - b * 8 * sin, y + a * 18 * sin + b * 8 * cos)
                    for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))
                ]
                ImageDraw.Draw(image).polygon(corners, fill=(230, 200, 30))
                polygon = [value for px, py in corners for value in (px / WIDTH, py / HEIGHT)]
                upright = [x / WIDTH, y / HEIGHT, 36 / WIDTH, 16 / HEIGHT]
                lines.append(" ".join(f"{value:.6f}" for value in (polygon if oriented else upright)))
            image.save(root / "images" / split / f"{number}.jpg")
            labels = "".join(f"0 {line}\n" for line in lines)
            (root / "labels" / split / f"{number}.txt").write_text(labels, encoding="ascii")
    description = root / "data.yaml"
    description.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: {{0: bar}}\n", encoding="utf-8")
    return description


def options(folder: Path, oriented: bool, **more: Any) -> dict[str, Any]:
    return {
        "data": str(dataset(folder / "data", oriented)),
        "project": str(folder / "runs"),
        "name": "run",
        "exist_ok": True,
        "epochs": 2,
        "batch": 2,
        "imgsz": IMGSZ,
        "device": "cpu",
        "workers": 0,
        "plots": False,
        "amp": False,
        "teacher": "yolo",
        **more,
    }


@pytest.mark.parametrize("oriented", [True, False], ids=["obb", "detect"])
def test_one_line_distils_and_checkpoints_stay_plain(pool: TeacherPool, tmp_path: Path, oriented: bool) -> None:
    trainer = trainers.OBBDistillationTrainer if oriented else trainers.DetectionDistillationTrainer
    model = ultralytics.YOLO("yolo26n-obb.yaml" if oriented else "yolo26n.yaml")
    checked: list[dict[str, float]] = []

    def check(run: Any) -> None:
        checked.append({name: float(value) for name, value in run.loss_items.items()})

    model.add_callback("on_train_batch_end", check)
    model.train(trainer=trainer, **options(tmp_path, oriented))
    assert len(checked) == 4
    assert all(math.isfinite(items["distill"]) and 0 < items["distill"] < 2 for items in checked)
    assert checked[0].keys() > {"distill", "box_loss", "cls_loss"}
    assert model.trainer.train_loader.stream.statistics().steps == 4
    weights = model.trainer.wdir
    assert b"dinov3" not in (weights / "last.pt").read_bytes()
    assert (weights / "distill.pt").exists()


def test_targets_are_those_of_the_letterboxed_view(pool: TeacherPool, tmp_path: Path) -> None:
    trainer = trainers.OBBDistillationTrainer(overrides={**options(tmp_path, True), "model": "yolo26n-obb.yaml"})
    compared: list[int] = []

    def compare(run: Any) -> None:
        for batch in run.train_loader:
            assert batch["img"].dtype == torch.uint8
            expected = FakeTeacher().extract(batch["img"], FeatureSpec(feature_map=True)).feature_map
            assert torch.equal(batch["teacher"].feature_map, expected)
            compared.append(len(batch["img"]))
        raise LookupError("seen enough")

    trainer.add_callback("on_train_start", compare)
    with pytest.raises(LookupError, match="seen enough"):
        trainer.train()
    assert sum(compared) == 4


def test_a_rank_is_made_from_the_pickled_launch(pool: TeacherPool, tmp_path: Path) -> None:
    from ultralytics.utils import DEFAULT_CFG_DICT
    from ultralytics.utils.dist import ddp_cleanup, generate_ddp_file
    from ultralytics.utils.patches import torch_load

    arguments = {**options(tmp_path, True, object_weight=3.0, epochs=1), "model": "yolo26n-obb.yaml"}
    launcher = trainers.OBBDistillationTrainer(overrides=arguments)
    launcher.args.__dict__.update(launcher.arguments_for_ranks())
    file = generate_ddp_file(launcher)
    try:
        state = torch_load(Path(file).with_suffix(".pt"), map_location="cpu")
    finally:
        ddp_cleanup(launcher, file)
    rank = state["trainer"](cfg={**DEFAULT_CFG_DICT, "save_dir": ""}, overrides=state["args"])
    assert rank.distillation == launcher.distillation
    assert rank.distillation.object_weight == 3.0
    rank.train()
    assert rank.train_loader.stream.statistics().steps == 2


def test_the_teacher_must_be_named(tmp_path: Path) -> None:
    arguments = options(tmp_path, True)
    del arguments["teacher"]
    with pytest.raises(ConfigError, match="teacher must be given"):
        ultralytics.YOLO("yolo26n-obb.yaml").train(trainer=trainers.OBBDistillationTrainer, **arguments)
