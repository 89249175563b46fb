"""``dinov3-ray distill`` from its beginning to its end: interrupted, killed, and resumed to the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from commandline import run_command
from PIL import Image
from students import HALT, halting
from waiting import until

from dinov3_ray import DinoV3Config, TeacherPool
from dinov3_ray.distillation.run_folder import CHECKPOINT, METRICS, STUDENT, SUMMARY, RunFolder
from dinov3_ray.scenes.drawing import draw_scene

STEPS = 24
OPTIONS = ("--student", "students:halting", "--image-size", 64, "--steps", STEPS, "--batch", 4)
OPTIONS += ("--save-every", 4, "--workers", 1, "--lr", 0.003)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes, and a file that cannot be read."""
    folder = tmp_path_factory.mktemp("scenes")
    for seed in range(20):
        pixels = draw_scene(seed, 96).permute(1, 2, 0).numpy()
        (folder / str(seed % 2)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / str(seed % 2) / f"{seed}.png")
    (folder / "broken.jpg").write_bytes(b"x")
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    chance = np.random.default_rng(0)
    for name in ("red", "blue"):
        (folder / name).mkdir()
        for number in range(6):
            pixels = chance.integers(0, 120, (64, 64, 3), dtype=np.uint8)
            pixels[:, :, 0 if name == "red" else 2] += 120
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> DinoV3Config:
    return DinoV3Config(tiny_checkpoint, image_size="input")


@pytest.fixture(scope="module")
def pool(ray_cluster: str, config: DinoV3Config) -> Iterator[str]:
    with TeacherPool.start(config, name="teaches", replicas=1, threads=1):
        yield "teaches"


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / STUDENT / "model.pt", weights_only=True)


def begin(out: Path, source: Path, address: str, halt: Path, step: int) -> subprocess.Popen[str]:
    """A run in a process of its own, which is in the middle of its step number ``step`` when this returns."""
    halt.mkdir()
    command = ["-m", "dinov3_ray", "distill", source, out, "--pool", "teaches", "--address", address, *OPTIONS]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), HALT: f"{step}:{halt}"}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    until(lambda: (halt / "there").exists() or process.poll() is not None, f"the run is in step {step}")
    return process


def test_a_run_that_is_interrupted_and_killed_ends_with_the_weights_of_an_undisturbed_one(
    ray_cluster: str, pool: str, scenes: Path, classes: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    # Undisturbed, with a pool of its own, and evaluated, which must not change anything.
    arguments = ("distill", scenes, whole, "--root", tiny_checkpoint, "--replicas", 1, "--address", ray_cluster)
    done = run_command(*arguments, *OPTIONS, "--evaluate", classes)
    assert done.exit_code == 0, done.output
    summary = json.loads((whole / SUMMARY).read_text())
    assert summary["last_loss"] < summary["first_loss"]
    assert list(summary["unreadable"]) == ["broken.jpg"]
    assert set(summary["scores"]) == {"before", "after", "teacher"}
    assert summary["scores"]["teacher"]["knn"] == 1.0
    assert "not read  1 of 21 images" in done.output
    halting().load_state_dict(weights(whole))
    assert not [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "distill-" in actor["name"]]

    first = begin(out, scenes, ray_cluster, tmp_path / "first", 7)
    first.send_signal(signal.SIGINT)
    (tmp_path / "first" / "go").touch()
    _, said = first.communicate(timeout=120)
    assert first.returncode == 130, said
    assert said.splitlines()[-1].startswith("interrupted: the same command continues")

    second = begin(out, scenes, ray_cluster, tmp_path / "second", 7)
    os.killpg(second.pid, signal.SIGKILL)
    _, said = second.communicate(timeout=120)
    assert f"after step 7 of {STEPS}" in said  # the step in which the signal came was done
    assert not (out / SUMMARY).exists()

    done = run_command("distill", scenes, out, "--pool", pool, "--address", ray_cluster, *OPTIONS)
    assert done.exit_code == 0, done.output
    assert f"after step 12 of {STEPS}" in done.output  # the last that was saved; the kill came in step 14
    mine, other = weights(out), weights(whole)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert [row["step"] for row in RunFolder(out).metrics()] == list(range(2, STEPS + 1, 2))
    losses = [[row["loss"] for row in RunFolder(each).metrics()] for each in (out, whole)]
    assert losses[0] == losses[1]

    # A run that is finished is not done again, and one of other settings is refused.
    changed = (out / CHECKPOINT).stat().st_mtime_ns, (out / METRICS).stat().st_mtime_ns
    again = run_command("distill", scenes, out, "--pool", pool, "--address", ray_cluster, *OPTIONS)
    assert again.exit_code == 0
    assert "is finished" in again.output
    other_lr = run_command("distill", scenes, out, "--pool", pool, "--address", ray_cluster, *OPTIONS, "--lr", 0.1)
    assert other_lr.exit_code == 1
    assert "other settings: lr was 0.003, and is 0.1" in other_lr.output
    assert changed == ((out / CHECKPOINT).stat().st_mtime_ns, (out / METRICS).stat().st_mtime_ns)

    # One that was finished without an evaluation is scored as one that had it from the beginning.
    scored = run_command(
        "distill", scenes, out, "--pool", pool, "--address", ray_cluster, *OPTIONS, "--evaluate", classes
    )
    assert scored.exit_code == 0, scored.output
    assert "before    not scored: --evaluate was not given when the run began" in scored.output
    found = json.loads((out / SUMMARY).read_text())
    assert found["scores"] == {which: summary["scores"][which] for which in ("after", "teacher")}
    assert found["last_loss"] == summary["last_loss"]
