"""A folder of photographs for the demonstration."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor


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
