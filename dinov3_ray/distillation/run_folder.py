"""The folder of a run: its files, and how each is written whole or not at all.

::

    OUT/
      run.json        what is distilled into what, on which images, under which settings
      checkpoint.pt   the state after some step: weights, projectors, optimizer, random numbers
      metrics.csv     the loss and the rates, every few steps
      student/        the student's weights, in its framework's own format  ┐ when all steps are done
      summary.json    what the run gave                                     ┘
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dinov3_ray.datasets.folder import Folder
from dinov3_ray.errors import CheckpointError, ConfigError, StoreError

__all__ = ["CHECKPOINT", "COLUMNS", "METRICS", "RUN", "STUDENT", "SUMMARY", "RunFolder"]

RUN, CHECKPOINT, METRICS, STUDENT, SUMMARY = "run.json", "checkpoint.pt", "metrics.csv", "student", "summary.json"

COLUMNS = ("step", "epoch", "loss", "lr", "images_per_second", "wait_share")
"""Of metrics.csv: ``loss`` is the mean since the row before; the rates are those of the process that wrote the row."""

_HALF_WRITTEN = f"{STUDENT}.part"
_TORCHS_WRITER = "inline_container", "PytorchStreamWriter"  # in torch.save's RuntimeErrors of a full disk


class RunFolder:
    """See the module's docstring.

    Raises:
        StoreError: from all that writes, where the disk is full or refuses it; no half of a file is left.
    """

    def __init__(self, out: Path) -> None:
        self.path = Path(os.path.abspath(out.expanduser()))
        self._folder = Folder.at(self.path)

    def join(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep other runs out of it; what an interrupted write left is deleted.

        Raises:
            StoreError: another process holds it, or it cannot be made.
            ConfigError: it has files, and no run.json.
        """
        if self.path.is_dir() and not self.join(RUN).exists():
            others = sorted(entry.name for entry in self.path.iterdir() if entry.name not in (".lock", _HALF_WRITTEN))
            others = [name for name in others if not name.startswith(RUN)]  # half written
            if others:
                raise ConfigError(
                    f"out must be a new or empty folder, or that of a run; {self.path} has no {RUN}, but {others[0]}"
                )
        with ExitStack() as stack:
            with self._writing():
                stack.enter_context(self._folder.exclusive())
                self._folder.sweep("")
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCHS_WRITER):
                raise
            self._folder.sweep("")
            shutil.rmtree(self.join(_HALF_WRITTEN), ignore_errors=True)
            raise StoreError(
                f"{self.path} cannot be written: {error} (free space there; the same command goes on)"
            ) from error

    def settings(self) -> dict[str, Any] | None:
        """Those of the run that is here; None if there is none."""
        return self._read(RUN)

    def summary(self) -> dict[str, Any] | None:
        """Of a run that has come to its end."""
        return self._read(SUMMARY)

    def _read(self, name: str) -> dict[str, Any] | None:
        if not self.join(name).exists():
            return None
        try:
            value = json.loads(self.join(name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{self.join(name)} is damaged: {error} (choose another out)") from error
        assert isinstance(value, dict)
        return value

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Raise ConfigError if the run that is here has other settings; compares those that both have."""
        there = self.settings() or {}
        differ = [name for name in settings if name in there and there[name] != settings[name]]
        if differ:
            what = "; ".join(f"{name} was {there[name]!r}, and is {settings[name]!r}" for name in differ)
            raise ConfigError(
                f"{self.path} holds a run with other settings: {what} (resume it with its own, or choose another out)"
            )

    def write_json(self, name: str, value: Any) -> None:
        with self._writing():
            self._folder.write_json(name, value)

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with self._writing():
            self._folder.write(CHECKPOINT, buffer.getbuffer())

    def checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, on the CPU; None before the first.

        Raises:
            CheckpointError: it is damaged.
        """
        path = self.join(CHECKPOINT)
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and its unpickler raise what they stumble over
            raise CheckpointError(f"{path} is damaged: {error} (delete it, and the run begins anew)") from error
        assert isinstance(state, dict)
        return state

    def cut_metrics(self, step: int) -> list[dict[str, float]]:
        """Drop the rows after ``step``, which a resumed run writes again; returns the others."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(_formatted(row) for row in rows)
        with self._writing():
            self._folder.write(METRICS, text.getvalue().encode())
        return rows

    def add_metrics(self, row: Mapping[str, float]) -> None:
        with self._writing(), self.join(METRICS).open("a", encoding="ascii") as file:
            csv.writer(file, lineterminator="\n").writerow(_formatted(row))

    def metrics(self) -> list[dict[str, float]]:
        """The rows that are whole: kill -9 may have cut the last one."""
        if not self.join(METRICS).exists():
            return []
        found = []
        with self.join(METRICS).open(encoding="ascii", newline="") as file:
            for line in csv.DictReader(line for line in file if line.endswith("\n")):
                if None not in line.values() and None not in line:
                    found.append({name: float(line[name]) for name in COLUMNS})
        return found

    def write_student(self, write: Callable[[Path], None]) -> Path:
        """Put what ``write`` writes into the folder of the student's weights, all of it or nothing.

        Who may read the files is the umask's to say: safetensors makes its own the user's alone.
        """
        part, final = self.join(_HALF_WRITTEN), self.join(STUDENT)
        shutil.rmtree(part, ignore_errors=True)
        with self._writing():
            part.mkdir()
            write(part)
            mode = part.stat().st_mode & 0o666
            for file in part.rglob("*"):
                if file.is_file():
                    file.chmod(mode)
            shutil.rmtree(final, ignore_errors=True)  # of a run that was killed before its summary was written
            part.rename(final)
        return final


def _formatted(row: Mapping[str, float]) -> list[str]:
    return [f"{row[name]:.0f}" if name == "step" else f"{row[name]:.9g}" for name in COLUMNS]
