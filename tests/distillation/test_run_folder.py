"""A run's folder: its files are whole or not there, and a run of other settings is told what differs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dinov3_ray.distillation.run_folder import CHECKPOINT, METRICS, RUN, STUDENT, RunFolder
from dinov3_ray.errors import CheckpointError, ConfigError, StoreError


def row(step: int, loss: float = 0.5) -> dict[str, float]:
    return {"step": step, "epoch": 0.1, "loss": loss, "lr": 1e-3, "images_per_second": 9.0, "wait_share": 0.0}


def test_a_save_that_fails_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    with folder.held():
        folder.write_json(RUN, {})
        folder.save({"step": 3, "weights": torch.arange(4)})
        with pytest.raises(Exception, match="lambda"):
            folder.save({"step": 4, "weights": lambda: None})
        # What a kill in the middle of a write leaves: a part, under another name.
        part = tmp_path / "out" / f"{CHECKPOINT}.tmp-0123abcd"
        part.write_bytes((tmp_path / "out" / CHECKPOINT).read_bytes()[:100])
    with folder.held():
        assert not part.exists()
        state = folder.checkpoint()
    assert state is not None
    assert state["step"] == 3
    assert torch.equal(state["weights"], torch.arange(4))


def test_a_checkpoint_that_is_damaged_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.checkpoint() is None
    folder.save({"step": 1})
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:200])
    with pytest.raises(CheckpointError, match=f"{CHECKPOINT} is damaged"):
        folder.checkpoint()


def test_rows_after_the_checkpoint_and_half_a_row_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.cut_metrics(0) == []
    for step in (10, 20, 30):
        folder.add_metrics(row(step, step / 100))
    with (tmp_path / METRICS).open("a") as file:
        file.write("40,0.1,0.")
    assert [each["step"] for each in folder.metrics()] == [10, 20, 30]
    assert [each["loss"] for each in folder.cut_metrics(20)] == [0.1, 0.2]
    folder.add_metrics(row(30, 0.9))
    assert [each["loss"] for each in folder.metrics()] == [0.1, 0.2, 0.9]


def test_other_settings_are_told_by_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.check_same({"lr": 1e-3})
    folder.write_json(RUN, {"lr": 1e-3, "batch": 8, "fingerprint": "abc"})
    folder.check_same({"lr": 1e-3, "batch": 8})
    with pytest.raises(ConfigError, match=r"other settings: lr was 0\.001, and is 0\.002; batch was 8, and is 9"):
        folder.check_same({"lr": 2e-3, "batch": 9})


def test_a_folder_of_something_else_and_one_in_use_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"must be a new or empty folder.*notes\.txt"), RunFolder(tmp_path).held():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    first, second = RunFolder(tmp_path / "out"), RunFolder(tmp_path / "out")
    with first.held(), pytest.raises(StoreError, match="being written by another run"), second.held():
        pass


def test_the_weights_are_there_when_all_of_them_are(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def fail(part: Path) -> None:
        (part / "half.pt").write_bytes(b"x")
        raise OSError("no room")

    with pytest.raises(StoreError, match=r"cannot be written: no room \(free space there; the same command goes on\)"):
        folder.write_student(fail)
    assert not list(tmp_path.iterdir())
    net = nn.Linear(2, 2)
    for _ in range(2):  # a run that was killed before its summary writes them again
        folder.write_student(lambda part: torch.save(net.state_dict(), part / "model.pt"))
    assert [path.name for path in (tmp_path / STUDENT).iterdir()] == ["model.pt"]


def test_an_error_of_the_writers_own_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        RunFolder(tmp_path).write_student(fail)


def test_the_weights_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    def write(part: Path) -> None:
        (part / "more").mkdir()
        save_file({"a": torch.zeros(2)}, part / "more" / "model.safetensors")

    before = os.umask(0o027)
    try:
        RunFolder(tmp_path).write_student(write)
    finally:
        os.umask(before)
    assert (tmp_path / STUDENT / "more" / "model.safetensors").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / STUDENT / "more").stat().st_mode & 0o777 == 0o750


FULL = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from dinov3_ray.distillation.run_folder import COLUMNS, RunFolder
from dinov3_ray.errors import StoreError

folder, large = RunFolder(Path(sys.argv[1])), torch.zeros(200_000)
row = dict.fromkeys(COLUMNS, 0.1)

def fill():
    for _ in range(100_000):
        folder.add_metrics(row)

with folder.held():
    folder.save({"step": 1})
    for write in (
        lambda: folder.save({"large": large}),
        lambda: folder.write_student(lambda part: torch.save({"large": large}, part / "model.pt")),
        lambda: folder.write_student(lambda part: save_file({"large": large}, part / "model.safetensors")),
        fill,
    ):
        try:
            write()
        except StoreError as error:
            print("told", error)
    print("left", *sorted(path.name for path in folder.path.iterdir()), folder.checkpoint())
"""


@pytest.mark.slow
def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path: Path) -> None:
    """On a file system in memory, in a mount namespace of its own; without such namespaces, by a limit on files."""
    program = [sys.executable, "-c", FULL, tmp_path]
    small = 'mount -t tmpfs -o size=400k none "$0" || exit 77; exec "$@"'
    for words in (
        ["unshare", "--mount", "--map-root-user", "sh", "-c", small, tmp_path],
        ["sh", "-c", 'ulimit -f 400; exec "$@"', "sh"],
    ):
        ran = subprocess.run([*map(str, [*words, *program])], capture_output=True, text=True, timeout=120, check=False)
        if ran.returncode != 77 and "unshare" not in ran.stderr:
            break
    *told, left = ran.stdout.splitlines()
    assert len(told) == 4, ran
    for line in told:
        assert line.startswith(f"told {tmp_path} cannot be written: "), ran
        assert line.endswith("(free space there; the same command goes on)"), ran
    assert left == f"left .lock {CHECKPOINT} {METRICS} {{'step': 1}}"
