"""The Python blocks of the README run, in order."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from paths import README
from transformers_models import KINDS, write_transformers


def python_blocks() -> list[tuple[int, str]]:
    """Each fenced Python block, with the number of its first line."""
    text = README.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: block.start(1)].count("\n") + 1, block[1]) for block in found]


@pytest.fixture
def readers_folder(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of somebody who follows the README: it holds ``dinov3`` and ``siglip2``."""
    shutil.copytree(tiny_checkpoint, tmp_path / "dinov3")
    write_transformers(tmp_path / "siglip2", *KINDS["siglip2"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("readers_folder", "ray_cluster")
def test_the_python_blocks_run_in_order() -> None:
    blocks = python_blocks()
    assert len(blocks) >= 6
    namespace: dict[str, object] = {"__name__": "readme"}
    for line, source in blocks:
        # Blank lines in front, so that a traceback shows the README's own line.
        exec(compile("\n" * (line - 1) + source, str(README), "exec"), namespace)
