"""The demonstration as a user runs it: a separate process, real Ray, real signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from commandline import run_command
from PIL import Image

from dinov3_ray import DinoV3Teacher
from dinov3_ray.demo import demonstration
from dinov3_ray.demo.demonstration import DemoSettings, run_demo
from dinov3_ray.distillation.display import Display, StepReport
from dinov3_ray.interrupts import Interrupts
from dinov3_ray.scenes.scene_teacher import SceneTeaching

PATIENCE = 120  # seconds; never reached unless something hangs


def start_demo(*arguments: str, home: Path) -> subprocess.Popen[str]:
    """The command as the leader of a session, by which its descendants can be found."""
    home.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "dinov3_ray", "demo", *arguments],
        env={**os.environ, "HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes_of(session: int) -> dict[int, str]:
    """Living processes of a session: their command lines."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its_session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found[int(process.name)] = (process / "cmdline").read_text()
        except OSError:
            continue  # it has ended
    return found


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Standard error up to the line that matches."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if re.search(pattern, line):
            return "".join(seen)
    raise AssertionError(f"it ended without {pattern!r}:\n{''.join(seen)}")


def test_it_teaches_on_the_users_photographs_and_leaves_nothing_but_its_files(
    photograph_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    out, home = tmp_path / "out", tmp_path / "home"
    arguments = [
        "--steps",
        "14",
        "--batch",
        "4",
        "--replicas",
        "1",
        "--images",
        str(photograph_folder),
        "--out",
        str(out),
    ]
    process = start_demo(*arguments, home=home)
    early = read_until(process, "step 1/14 ")
    assert any("raylet" in command for command in processes_of(process.pid).values())
    stdout, stderr = process.communicate(timeout=PATIENCE)
    stderr = early + stderr
    assert process.returncode == 0, stderr
    assert not processes_of(process.pid)
    assert not (home / ".ray").exists()

    assert sorted(path.name for path in out.iterdir()) == ["loss.png", "maps.png", "summary.json"]
    for name in ("loss.png", "maps.png"):
        with Image.open(out / name) as image:
            image.load()
            assert len(image.convert("RGB").getcolors(2**24)) > 50
    summary = json.loads((out / "summary.json").read_text())
    assert "probe_before" not in summary
    losses = summary["losses"]
    assert len(losses) == 14
    assert summary["first_loss"] == losses[0]
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]
    assert summary["images_per_second"] > 0
    assert 0 <= summary["wait_share"] <= 1
    assert summary["replicas"] == 1
    assert summary["fingerprint"]

    # No terminal: lines, not control characters; and what is in the way is named, not fatal.
    assert "\x1b" not in stderr + stdout
    assert "\r" not in stderr + stdout
    assert "step 14/14  loss" in stderr
    assert "skipped: broken.png (not an image)" in stderr
    assert "Traceback" not in stderr
    assert re.search(rf"loss +{summary['first_loss']:.3f} -> {summary['last_loss']:.3f}", stdout)
    assert str(out / "maps.png") in stdout


def test_an_interrupt_leaves_no_process_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    process = start_demo("--out", str(tmp_path / "out"), home=tmp_path / "home")
    read_until(process, "starting 2 teachers")  # Ray is whole by now, the pool half made
    commands = " ".join(processes_of(process.pid).values())
    assert "raylet" in commands
    folder = re.search(r"/tmp/dinov3-\w+", commands)
    assert folder is not None
    assert Path(folder[0]).is_dir()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith("interrupted: ")
    assert "Traceback" not in stderr
    assert stdout == ""
    assert not processes_of(process.pid)
    assert not Path(folder[0]).exists()
    assert not list((tmp_path / "out").iterdir())


def demo_actors() -> list[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if "/demo-" in actor["name"]]


class InterruptingDisplay(Display):
    """Ctrl-C as the first step ends, when targets are in flight."""

    @contextmanager
    def training(self, steps: int) -> Iterator[StepReport]:
        def interrupt(*_: object) -> None:
            assert len(demo_actors()) == 3  # the pool's controller, its replica, and what holds it for this process
            os.kill(os.getpid(), signal.SIGINT)

        yield interrupt


def test_an_interrupt_leaves_no_actor_in_a_ray_that_it_joined(ray_cluster: str, tmp_path: Path) -> None:
    settings = DemoSettings(tmp_path / "out", replicas=1, batch=2, address=ray_cluster)
    with Interrupts("") as interrupts, pytest.raises(KeyboardInterrupt):
        run_demo(settings, InterruptingDisplay(), interrupts)
    assert interrupts.exit_code == 130
    assert not demo_actors()
    assert ray.is_initialized(), "this process's own connection stays"
    assert not list((tmp_path / "out").iterdir())


def test_with_a_trained_teacher_it_probes_the_student_before_and_after(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = SceneTeaching(side=32, scenes=6, steps=2, batch=4)
    monkeypatch.setattr(demonstration, "SceneTeaching", lambda: small)
    out = tmp_path / "out"
    options = ["--steps", 4, "--batch", 2, "--replicas", 1, "--address", ray_cluster, "--out", out]
    result = run_command("demo", "--trained", *options)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    before, after = summary["probe_before"], summary["probe_after"]
    assert 0 < before < 1
    assert 0 < after < 1
    assert before != after
    assert f"probe     {before:.1%} -> {after:.1%} (mIoU of a linear probe" in result.stdout
    made = tmp_path / "cache" / "dinov3_ray" / f"scene-teacher-{small.key}"
    assert summary["fingerprint"] == DinoV3Teacher(made).fingerprint
