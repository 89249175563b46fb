"""The backbone in a file of tensors: torch's or safetensors', with whatever training has wrapped around it.

Pickles are read with ``weights_only=True``: they cannot run code.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3_ray.checkpoint.tensors import DTYPES
from dinov3_ray.config.filetype import FileType, file_type
from dinov3_ray.config.layouts import ROOTS, Layout, foreign_model, layout_of
from dinov3_ray.config.weights import canonical_name, read_stored
from dinov3_ray.errors import CheckpointError

__all__ = ["Backbone", "find_backbone", "read_files", "shapes_of", "weight_types"]

# What torch.compile, DistributedDataParallel, FSDP and activation checkpointing insert into names.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_DEPTH = 12  # of dicts in dicts
_DICT = "/"
# What trainers keep beside tensors, and cannot run code: their arguments, and numbers of NumPy.
_SCALAR: Any = np.float64(0).__reduce__()[0]
_SAFE: list[tuple[Any, str]] = [
    (kind, f"{kind.__module__}.{kind.__name__}")
    for kind in (argparse.Namespace, np.dtype, _SCALAR, *(type(np.dtype(name)) for name in ("f8", "f4", "i8")))
]
_SAFE.append((_SCALAR, "numpy.core.multiarray.scalar"))  # NumPy 1's name of it


@dataclass(frozen=True, slots=True)
class Backbone:
    """One backbone of a file.

    Attributes:
        tensors: by their names in its layout.
        layout: whose names these are.
        notes: for the user: which backbone this is of several, and what wraps it.
    """

    tensors: dict[str, Tensor]
    layout: Layout
    notes: tuple[str, ...]


def weight_types(paths: Sequence[Path]) -> dict[Path, FileType]:
    """Which of the formats that hold weights each file is of.

    Raises:
        CheckpointError: a file is missing or another thing; the message says what, and what to do.
    """
    types = {}
    for path in paths:
        try:
            types[path] = file_type(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        if types[path].format is None:
            raise CheckpointError(f"{path} cannot be read as weights: it is {types[path]}")
    return types


def read_files(types: Mapping[Path, FileType], *, intact: bool = False) -> dict[str, Tensor]:
    """All tensors of some files, mapped rather than read where the format allows it.

    A tensor's name is its own, behind the names of the dicts in which it lies, each with a stroke.

    Args:
        types: the files, from :func:`weight_types`.
        intact: the files are known to be as they were made: their own checksums need not be compared.

    Raises:
        CheckpointError: a file is damaged, or holds other things than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for path, found in types.items():
        if found.format == "safetensors":
            content: Any = _map_safetensors(path)
        else:
            if not intact:
                _check_sums(path)
            content = _load_torch(path, found.what)
        flat = dict(_flatten(content))
        if not flat:
            raise CheckpointError(f"{path} must hold a state dict of tensors; found {_kind(content)}")
        for name, tensor in flat.items():
            plain = _without_wrappers(name)
            first = tensors.setdefault(plain, tensor)
            if first is not tensor and not torch.equal(first, tensor):  # one module may have two names
                what = plain.replace(_DICT, ".")
                raise CheckpointError(f"{path} holds {what} more than once: save one model's state_dict() alone")
    return tensors


def _kind(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return (", ".join(map(str, list(content)[:6])) or "an empty dict") + (", ..." if len(content) > 6 else "")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _map_safetensors(path: Path) -> dict[str, Tensor]:
    tensors = {}
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    for stored in read_stored(path):
        part, dtype = data[stored.start : stored.stop], DTYPES[stored.dtype]
        if stored.start % dtype.itemsize:  # a header of an odd length
            part = part.clone()
        tensors[stored.key] = part.view(dtype).view(stored.shape)
    return tensors


def _load_torch(path: Path, what: str) -> Any:
    try:
        with torch.serialization.safe_globals([*_SAFE]):
            if path.suffix != ".safetensors":  # by this name torch would take it for one
                with contextlib.suppress(RuntimeError):  # torch's older file format cannot be mapped
                    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with path.open("rb") as stream:
                return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, error)) from None  # torch's text advises to run the file's code
    except Exception as error:  # damaged bytes make torch's unpickler fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise CheckpointError(
            f"{path} cannot be read: it is {what}, but truncated or damaged; download it again ({reason})"
        ) from error


def _check_sums(path: Path) -> None:
    """Compare the checksums that torch's file format has for each tensor: one flipped byte is found."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        try:
            bad = archive.testzip()
        except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: it is a damaged torch file ({error})") from error
    if bad is not None:
        raise CheckpointError(
            f"{path} is damaged: the bytes of {bad} in it do not have the checksum (CRC-32) that was stored with them. "
            "Download it again"
        )


def _refusal(path: Path, error: Exception) -> str:
    """Why a pickle was not read, without torch's own advice."""
    names = _objects_in(path) or re.findall(r"GLOBAL ([\w.]*\w)(?![\w.])", str(error))[:1]
    what = f"{path} cannot be read as a torch checkpoint of plain tensors"
    if not names:
        return (
            f"{what}: it is a pickle, but not as torch.save writes one, or damaged. Where it comes from, save the "
            "state_dict() of the model with torch.save; or download it again"
        )
    listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    if any(name.startswith("lightly_train.") for name in names):
        return (
            f"{what}: it is a training checkpoint of LightlyTrain, with Python objects ({listed}); to read them would "
            "run code. The tensors alone are in its run's exported_models/exported_last.pt: convert that"
        )
    return (
        f"{what}: it holds Python objects ({listed}), and to read them would run code, so they were not read. Where it "
        "comes from, save the tensors alone: torch.save(model.state_dict(), 'weights.pth'), and convert that"
    )


def _objects_in(path: Path) -> list[str]:
    """The names of the classes and functions that a file of torch's newer format needs beyond tensors."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, OSError, EOFError, LookupError, pickle.UnpicklingError):
        return []
    return sorted(set(names) - {name for _, name in _SAFE})


def _flatten(value: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, Mapping) and depth < _DEPTH:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}{_DICT}{key}" if prefix else str(key), depth + 1)


def _without_wrappers(name: str) -> str:
    dicts = (".".join(word for word in part.split(".") if word not in _WRAPPERS) for part in name.split(_DICT))
    return _DICT.join(part for part in dicts if part)


def find_backbone(tensors: Mapping[str, Tensor], wanted: str | None, where: str) -> Backbone:
    """The backbone among ``tensors``, however deep it lies.

    Of several, a teacher's is taken before an averaged one, and that before others and a student's.

    Args:
        wanted: the dotted name of the backbone, such as ``student.backbone``; None lets the names decide.
        where: what a message calls the file.

    Raises:
        CheckpointError: there is none, or a model of another kind, or there are several of which none is preferred.
    """
    prefixes = sorted(set(_prefixes(tensors)))
    if not prefixes:
        raise CheckpointError(_without_backbone(tensors, where))
    prefix, notes = _choose(prefixes, wanted, where)
    others = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    mine = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and _DICT not in name[len(prefix) :] and not (others and name.startswith(others))
    }
    layout = layout_of(mine)
    if layout is None:
        foreign = foreign_model(shapes_of(mine))
        what = (
            f"is {foreign}" if foreign else f"is not an official DINOv3 checkpoint, nor timm's; it holds {_some(mine)}"
        )
        raise CheckpointError(f"{where} {what}")
    if layout == "transformers":
        mine = {canonical_name(name): tensor for name, tensor in mine.items()}
    return Backbone(mine, layout, notes)


def _prefixes(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for name in tensors:
        for root in ROOTS:
            if name == root or name.endswith((f".{root}", f"{_DICT}{root}")):
                prefix = name.removesuffix(root)
                # transformers 5.5 moved the stages of a ConvNeXt, but not its last norm, into an inner `model`.
                outer = prefix.removesuffix("model.")
                inner = root.startswith("stages.") and outer != prefix and f"{outer}layer_norm.weight" in tensors
                yield outer if inner else prefix


def _rank(prefix: str) -> int:
    words = re.split(r"[._/]", prefix.lower())
    if "gram" in words:  # an early teacher, to which patch features are tied
        return 4
    return next((rank for word, rank in {"teacher": 0, "ema": 1, "student": 3}.items() if word in words), 2)


def _choose(prefixes: list[str], wanted: str | None, where: str) -> tuple[str, tuple[str, ...]]:
    names = {prefix: prefix.rstrip("./").replace(_DICT, ".") or "(top)" for prefix in prefixes}
    listed = ", ".join(names.values())
    if wanted is not None:
        found = [prefix for prefix, name in names.items() if name == wanted.strip(".")]
        if not found:
            raise CheckpointError(f"{where} has no backbone {wanted!r}; it has {listed}")
        return found[0], ()
    best = min(map(_rank, prefixes))
    leading = [prefix for prefix in prefixes if _rank(prefix) == best]
    if len(leading) > 1:
        raise CheckpointError(
            f"{where} holds {len(prefixes)} backbones ({listed}), and none is a teacher's alone: name one of them "
            f"(backbone={names[leading[0]]!r}, --backbone {names[leading[0]]})"
        )
    taken = leading[0]
    if len(prefixes) == 1:
        student = best == 3
        return taken, (f"the backbone is the student's ({names[taken]}); the file has no teacher's",) if student else ()
    reason = {0: "the teacher's", 1: "the averaged weights"}.get(best, "no student's and no early teacher's")
    left = ", ".join(name for prefix, name in names.items() if prefix != taken)
    return taken, (f"of its {len(prefixes)} backbones, {names[taken]} was taken ({reason}); --backbone takes {left}",)


def _without_backbone(tensors: Mapping[str, Tensor], where: str) -> str:
    if foreign := foreign_model(shapes_of(tensors)):
        return f"{where} is {foreign}"
    head = (
        " It may be a head, which is of use with its backbone only: convert the backbone's file."
        if "head" in (f"{where} {' '.join(tensors)}".lower())
        else ""
    )
    return f"{where} holds no DINOv3 backbone, but tensors that no published DINOv3 has: {_some(tensors)}.{head}"


def _some(tensors: Mapping[str, Tensor]) -> str:
    names = [f"{name.replace(_DICT, '.')} {list(tensor.shape)}" for name, tensor in tensors.items()]
    return ", ".join(names[:4]) + (f", ... ({len(names):,} in all)" if len(names) > 4 else "")
