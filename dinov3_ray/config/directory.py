"""The files of a model directory, and the command that makes one of other files."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

__all__ = [
    "CONFIG_FILE",
    "INDEX_FILE",
    "PREPROCESSOR_FILE",
    "PROCESSOR_FILE",
    "SINGLE_FILE",
    "TORCH_FILE",
    "TORCH_INDEX_FILE",
    "conversion_remedy",
    "convert_hint",
    "foreign_type",
    "missing_target",
    "save_command",
    "shards_of_file",
    "statistics_named",
]

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
"""Into which transformers 5 writes a two-tower model's image processor too."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX_FILE = "pytorch_model.bin.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)")
_WEIGHT_SUFFIXES = {".bin", ".pth", ".pt", ".ckpt", ".safetensors"}
_STATISTICS = {"sat493m": re.compile(r"sat[-_]?493", re.IGNORECASE)}
_STATISTICS |= {"lvd1689m": re.compile(r"lvd[-_]?1689|eupe", re.IGNORECASE)}  # EUPE was trained on LVD-1689M too


def statistics_named(name: str) -> set[str]:
    """The training sets whose image statistics a name asks for: none, ``lvd1689m``, ``sat493m``, or both."""
    return {statistics for statistics, pattern in _STATISTICS.items() if pattern.search(name)}


def conversion_remedy(path: Path) -> str:
    """The command that makes a model directory of the weights in ``path``, a file or a folder, in a sentence."""
    folder = path if path.is_dir() else path.parent
    if (path == folder or path.name in (SINGLE_FILE, TORCH_FILE)) and (model_type := foreign_type(folder)):
        return _save_hint(folder, model_type)
    command = f"dinov3-ray checkpoint convert {path} NEW_DIRECTORY"
    if statistics_named(path.name) or _comes_with_preprocessing(path):
        return f"`{command}` makes a model directory of it"
    return f"`{command} --statistics lvd1689m` (sat493m, if it is a satellite model) makes a model directory of it"


def foreign_type(folder: Path) -> str | None:
    """The ``model_type`` of a folder's config.json, if it is that of a model of transformers other than DINOv3."""
    try:
        named = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return named if isinstance(named, str) and not named.startswith("dinov3") else None


def save_command(source: str | Path, **options: str) -> str:
    """The command by which transformers reads its model ``source``, and writes it as safetensors."""
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    code = (
        "from transformers import AutoModel; "
        f"AutoModel.from_pretrained({str(source)!r}{arguments}).save_pretrained('NEW_DIRECTORY')"
    )
    return f"python -c {shlex.quote(code) if chr(34) in code or '$' in code else chr(34) + code + chr(34)}"


def _save_hint(folder: Path, model_type: str) -> str:
    steps = [save_command(folder)]
    if (folder / SINGLE_FILE).is_file():  # torch's format under another's name, or there were nothing to do
        steps.insert(0, shlex.join(["mv", str(folder / SINGLE_FILE), str(folder / TORCH_FILE)]))
    described = [str(folder / name) for name in (PREPROCESSOR_FILE, PROCESSOR_FILE) if (folder / name).is_file()]
    if described:
        steps.append(f"{shlex.join(['cp', *described])} NEW_DIRECTORY")
    return f"`{' && '.join(steps)}` makes a directory with safetensors of this {model_type}"


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


def shards_of_file(path: Path) -> list[Path] | None:
    """All files of the model of which ``path`` is a part by its name, ``STEM-00001-of-00002.SUFFIX``; None if it says
    no such thing. They need not exist."""
    if not (part := _SHARD.fullmatch(path.name)):
        return None
    width, count = len(part["number"]), int(part["count"])
    names = [f"{part['stem']}-{number:0{width}d}-of-{part['count']}{part['suffix']}" for number in range(count + 1)]
    from_zero = path.name == names[0] or (path.parent / names[0]).exists()
    return [path.parent / name for name in (names[:-1] if from_zero else names[1:])]


def convert_hint(root: Path) -> str:
    """What makes a model directory of the weights that ``root`` has in another form; empty if it has none."""
    names = sorted(path.name for path in root.glob("*") if path.suffix in _WEIGHT_SUFFIXES and path.is_file())
    if not names:
        return ""
    listed = f"it has {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}: "
    whole = [name for name in names if not shards_of_file(root / name)]
    if TORCH_FILE in names:
        whole = [TORCH_FILE]
    if not whole or (root / TORCH_INDEX_FILE).is_file() or foreign_type(root):
        return listed + conversion_remedy(root)
    return listed + ("convert one of them, as by " if len(whole) > 1 else "") + conversion_remedy(root / whole[0])
