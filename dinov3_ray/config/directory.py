"""The files of a model directory, and the command that makes one of other files."""

from __future__ import annotations

import json
import re
from pathlib import Path

__all__ = [
    "CONFIG_FILE",
    "INDEX_FILE",
    "PREPROCESSOR_FILE",
    "SINGLE_FILE",
    "TORCH_FILE",
    "TORCH_INDEX_FILE",
    "convert_command",
    "convert_hint",
    "missing_target",
    "statistics_named",
]

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX_FILE = "pytorch_model.bin.index.json"
_WEIGHT_SUFFIXES = {".bin", ".pth", ".pt", ".ckpt", ".safetensors"}
_STATISTICS = {"sat493m": re.compile(r"sat[-_]?493", re.IGNORECASE)}
_STATISTICS |= {"lvd1689m": re.compile(r"lvd[-_]?1689|eupe", re.IGNORECASE)}  # EUPE was trained on LVD-1689M too


def statistics_named(name: str) -> set[str]:
    """The training sets whose image statistics a name asks for: none, ``lvd1689m``, ``sat493m``, or both."""
    return {statistics for statistics, pattern in _STATISTICS.items() if pattern.search(name)}


def convert_command(path: Path) -> str:
    """The command that makes a model directory of the weights in ``path``, a file or a folder, in a sentence."""
    command = f"dinov3-ray checkpoint convert {path} NEW_DIRECTORY"
    if statistics_named(path.name) or _comes_with_preprocessing(path):
        return f"`{command}` makes a model directory of it"
    return f"`{command} --statistics lvd1689m` (sat493m, if it is a satellite model) makes a model directory of it"


def _comes_with_preprocessing(path: Path) -> bool:
    folder = path if path.is_dir() else path.parent
    if folder == path.parent and path.name not in (SINGLE_FILE, TORCH_FILE):
        return False
    try:
        return (folder / PREPROCESSOR_FILE).is_file() or "pretrained_cfg" in json.loads(
            (folder / CONFIG_FILE).read_text(encoding="utf-8")
        )
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def missing_target(path: Path) -> str:
    """Where ``path`` leads to, if it is a link to what is missing, in words that follow its name; empty if not."""
    if not path.is_symlink() or path.exists():
        return ""
    return (
        f"is a link to {path.readlink()}, which is missing: download it again, or copy it with what its links lead to"
    )


def convert_hint(root: Path) -> str:
    """What makes a model directory of the weights that ``root`` has in another form; empty if it has none."""
    names = sorted(path.name for path in root.glob("*") if path.suffix in _WEIGHT_SUFFIXES and path.is_file())
    if not names:
        return ""
    listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    if (root / TORCH_INDEX_FILE).is_file():
        return f"it has {listed}: {convert_command(root)}"
    if len(names) > 1:
        return f"it has {listed}: convert one of them, as by {convert_command(root / names[0])}"
    return f"it has {listed}: {convert_command(root / names[0])}"
