"""Changes to files in place: to JSON, and to the weights of a model directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["change_json", "change_weights"]


def change_json(path: Path, change: Callable[..., object] = dict.update, /, **changes: object) -> None:
    """Give the file what ``change`` makes of its object: by default, the values of ``changes``."""
    values = json.loads(path.read_text())
    change(values, **changes)
    path.write_text(json.dumps(values))


def change_weights(root: Path, change: Callable[..., object] = dict.update, /, **changes: Tensor) -> None:
    """Give ``model.safetensors`` what ``change`` makes of its tensors: by default, those of ``changes``."""
    tensors = load_file(root / "model.safetensors")
    change(tensors, **changes)
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
