"""Tiny data sets in Ultralytics' formats, the options of a short run over one, and what a run did, step by step."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

HEIGHT, WIDTH, IMGSZ = 96, 160, 160
MODELS = {
    "detect": "yolo26n.yaml",
    "obb": "yolo26n-obb.yaml",
    "segment": "yolo26n-seg.yaml",
    "pose": "yolo26n-pose.yaml",
}


def bars(root: Path, task: str, images: int = 4) -> Path:
    """Bars on noise, wider than high, so that loaders letterbox them; returns the description of the data set."""
    chance = random.Random(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number in range(images):
            noise = np.random.default_rng(number).integers(60, 120, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            image, lines = Image.fromarray(noise), []
            for _ in range(2):
                x, y = chance.uniform(30, WIDTH - 30), chance.uniform(30, HEIGHT - 30)
                angle = chance.uniform(0, math.pi) if task == "obb" else 0.0
                cos, sin = math.cos(angle), math.sin(angle)
                corners = [
                    (x + a * 18 * cos - b * 8 * sin, y + a * 18 * sin + b * 8 * cos)
                    for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))
                ]
                ImageDraw.Draw(image).polygon(corners, fill=(230, 200, 30))
                polygon = [value for px, py in corners for value in (px / WIDTH, py / HEIGHT)]
                upright = [x / WIDTH, y / HEIGHT, 36 / WIDTH, 16 / HEIGHT]
                ends = [(x - 18) / WIDTH, y / HEIGHT, 2, (x + 18) / WIDTH, y / HEIGHT, 2]
                label = {"detect": upright, "pose": upright + ends}.get(task, polygon)
                lines.append(" ".join(f"{value:.6f}" for value in label))
            image.save(root / "images" / split / f"{number}.jpg")
            labels = "".join(f"0 {line}\n" for line in lines)
            (root / "labels" / split / f"{number}.txt").write_text(labels, encoding="ascii")
    keypoints = "kpt_shape: [2, 3]\nflip_idx: [1, 0]\n" if task == "pose" else ""
    description = root / "data.yaml"
    description.write_text(
        f"path: {root}\ntrain: images/train\nval: images/val\nnames: {{0: bar}}\n{keypoints}", encoding="utf-8"
    )
    return description


def options(folder: Path, task: str = "obb", **more: Any) -> dict[str, Any]:
    """Of a run of two epochs on the CPU, over ``folder``/data, with the pool named yolo as teacher."""
    data = folder / "data"
    return {
        "data": str(data / "data.yaml" if data.exists() else bars(data, task)),
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


class Steps:
    """The losses of a run by name, and the learning rates, at each step."""

    def __init__(self, model: Any) -> None:
        self.losses: list[dict[str, float]] = []
        self.rates: list[list[float]] = []
        model.add_callback("on_train_batch_end", self._look)

    def _look(self, trainer: Any) -> None:
        self.losses.append({name: float(value) for name, value in trainer.loss_items.items()})
        self.rates.append([group["lr"] for group in trainer.optimizer.param_groups])
