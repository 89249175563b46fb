"""A folder of image files for the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photographs: list[Tensor]) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for index, photograph in enumerate(photographs):
        Image.fromarray(photograph.permute(1, 2, 0).numpy()).save(root / f"{index}.png")
    (root / "broken.jpg").write_bytes(b"no image")
    return root
