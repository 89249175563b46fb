"""The demonstration as a user runs it: a process of its own, real Ray, real signals."""

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
import torch
from commandline import run_command
from PIL import Image
from torch import Tensor

from dinov3_ray.demo.demonstration import Settings, run
from dinov3_ray.demo.ephemeral_ray import gpus_a_replica
from dinov3_ray.demo.photographs import draw_scene, read_photographs
from dinov3_ray.demo.report import Display, Report
from dinov3_ray.demo.student import Student, Views, crop_centre
from dinov3_ray.interrupts import Interrupts

PATIENCE = 120  # seconds; never reached unless something hangs


@pytest.fixture
def photograph_folder(photographs: list[Tensor], tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    for index, photograph in enumerate(photographs):
        where = folder / "more" if index % 2 else folder
        Image.fromarray(photograph.permute(1, 2, 0).numpy()).save(where / f"{index}.jpg")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def start_demo(*arguments: str, home: Path) -> subprocess.Popen[str]:
    """The command, as the leader of a session: whatever descends from it can be told by that."""
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
    def training(self, steps: int) -> Iterator[Report]:
        def interrupt(*_: object) -> None:
            assert len(demo_actors()) == 2  # the pool's controller and its replica
            send(signal.SIGINT)

        yield interrupt


def test_an_interrupt_leaves_no_actor_in_a_ray_that_it_joined(ray_cluster: str, tmp_path: Path) -> None:
    settings = Settings(tmp_path / "out", replicas=1, batch=2, address=ray_cluster)
    with Interrupts("") as interrupts, pytest.raises(KeyboardInterrupt):
        run(settings, InterruptingDisplay(), interrupts)
    assert interrupts.exit_code == 130
    assert not demo_actors()
    assert ray.is_initialized(), "this process's own connection stays"
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", "nowhere"], "--images must be a folder of photographs; nowhere is missing"),
        (["--root", "nowhere"], "root must be a model directory"),
        (["--images", "empty"], "--images must hold image files"),
        (["--images", "broken"], r"bad\.jpg \(not an image\)"),
        (["--out", "empty/../broken/bad.jpg/out"], "--out must be a folder that can be written"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bad.jpg").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    result = run_command("demo", *arguments)
    assert result.exit_code == 1
    assert re.search(words, result.output)
    assert result.output.splitlines()[-1].startswith("Error: ")
    assert isinstance(result.exception, SystemExit)  # reported, not raised through


def test_photographs_come_upright_in_order_and_reduced(photograph_folder: Path, photographs: list[Tensor]) -> None:
    read = read_photographs(photograph_folder, at_most=4, shorter_side=100)
    assert [min(picture.shape[1:]) for picture in read.pictures] == [100, 100, 100]
    assert read.pictures[1].shape[2] == round(photographs[2].shape[2] * 100 / photographs[2].shape[1])
    assert [line.split(" ")[0] for line in read.skipped] == ["broken.png"]


def test_views_repeat_exactly_and_differ_from_each_other(photographs: list[Tensor]) -> None:
    views = Views(photographs, (64, 96), batch=4, steps=3, seed=5)
    first, again = list(views), list(views)
    assert len(first) == len(views) == 3
    assert all(batch.shape == (4, 3, 64, 96) and batch.dtype == torch.uint8 for batch in first)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    flat = torch.cat(first).flatten(1)
    assert len(flat.unique(dim=0)) == 12
    other = next(iter(Views(photographs, (64, 96), batch=4, steps=1, seed=6)))
    assert not torch.equal(other, first[0])


def test_every_picture_is_seen_before_any_is_seen_again() -> None:
    pictures = [torch.full((3, 40, 40), 40 * value, dtype=torch.uint8) for value in range(1, 6)]
    seen = torch.cat(list(Views(pictures, (16, 16), batch=5, steps=2, seed=0))).float().mean((1, 2, 3))
    for epoch in seen.split(5):  # brightness alone tells them apart, by rank: it is scaled by at most a fifth
        assert sorted(round(value / 40) for value in epoch.tolist())[0] <= 1
        assert epoch.max() > 3 * epoch.min()


def test_the_centre_of_a_picture_that_fits_is_the_picture(photographs: list[Tensor]) -> None:
    picture = photographs[0]
    assert torch.equal(crop_centre(picture, (picture.shape[1], picture.shape[2])), picture)


def test_scenes_are_the_same_every_time_and_all_different() -> None:
    scenes = [draw_scene(seed, 64) for seed in (0, 0, 1, 2)]
    assert torch.equal(scenes[0], scenes[1])
    assert len({scene.numpy().tobytes() for scene in scenes}) == 3
    assert scenes[0].shape == (3, 64, 64)
    assert scenes[0].dtype == torch.uint8


@pytest.mark.parametrize(("size", "grid"), [((64, 96), (4, 6)), ((71, 96), (4, 6)), ((518, 32), (32, 2))])
def test_the_student_has_its_teachers_grid(size: tuple[int, int], grid: tuple[int, int]) -> None:
    views_B3HW = torch.zeros(2, 3, *size, dtype=torch.uint8)
    assert Student(24, channels=16)(views_B3HW).shape == (2, 24, *grid)


@pytest.mark.parametrize(
    ("replicas", "free", "share"), [(2, 0, 0), (2, 0.5, 0), (2, 1, 0.5), (2, 2, 1), (3, 2, 0.5), (3, 1, 0.3333)]
)
def test_all_replicas_find_room_on_the_gpus_that_are_free(replicas: int, free: float, share: float) -> None:
    assert gpus_a_replica(replicas, free) == share
    assert replicas * share <= max(free, 0)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_held_interrupt_comes_at_the_end_and_only_the_first_is_raised() -> None:
    done: list[str] = []

    def hold() -> None:
        with interrupts.held():
            with interrupts.held():
                send(signal.SIGTERM)
            done.append("the outer stretch")
        done.append("what comes after it")

    before = signal.getsignal(signal.SIGTERM)
    with Interrupts("") as interrupts:
        with pytest.raises(KeyboardInterrupt):
            hold()
        send(signal.SIGINT)
        done.append("tidying up")
        assert interrupts.exit_code == 128 + signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert done == ["the outer stretch", "tidying up"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_raised_at_once(number: int) -> None:
    with Interrupts("") as interrupts:
        interrupts.check()
        with pytest.raises(KeyboardInterrupt):
            send(number)
    assert interrupts.signal == number


def test_while_there_is_nothing_to_tidy_up_an_interrupt_ends_the_process_with_the_last_words() -> None:
    program = """
import os, signal
from dinov3_ray.interrupts import Interrupts
try:
    with Interrupts("goodbye") as interrupts, interrupts.at_once():
        os.kill(os.getpid(), signal.SIGINT)
finally:
    print("not reached")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "goodbye\n")
