"""A run's folder: its files are whole or not there, and a run of other settings is told what differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
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

    with pytest.raises(OSError, match="no room"):
        folder.write_student(fail)
    assert not (tmp_path / STUDENT).exists()
    net = nn.Linear(2, 2)
    for _ in range(2):  # a run that was killed before its summary writes them again
        folder.write_student(lambda part: torch.save(net.state_dict(), part / "model.pt"))
    assert [path.name for path in (tmp_path / STUDENT).iterdir()] == ["model.pt"]
