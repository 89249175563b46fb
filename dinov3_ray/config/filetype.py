"""What a file is, by its content: weights in one of two formats, or what people have in their place."""

from __future__ import annotations

import re
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["FileType", "file_type"]

_HEAD = 4096
_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class FileType:
    """What a file is.

    Attributes:
        format: how it can be read; None if it holds no weights that could be.
        what: in words that follow "it is".
        remedy: what to do if it cannot be read.
        substitute: whether a download put it in the place of the file that was wanted, whatever that was.
    """

    format: Literal["safetensors", "torch"] | None
    what: str
    remedy: str
    substitute: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def file_type(path: Path) -> FileType:
    """What ``path`` is; names and suffixes decide nothing.

    Raises:
        OSError: it cannot be read.
    """
    if path.is_dir():
        return FileType(None, "a directory", "name a file in it")
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    if not head:
        return FileType(None, "empty, as if truncated to 0 bytes", _AGAIN, True)
    if not head.strip(b"\0"):
        return FileType(None, "a file that begins with zeros, as one that was not downloaded to its end", _AGAIN, True)
    # First, since the length of its header may begin like a pickle (640 bytes) or a zip archive (19,280).
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return FileType("safetensors", "a safetensors file", _AGAIN)
    if head.startswith(b"PK"):
        return _zip_type(path, size)
    if head.startswith(b"\x80") and head[1:2] in b"\x02\x03\x04\x05":
        return FileType("torch", "a pickle, torch's older format", _AGAIN)
    return _archive_type(path, head) or _text_type(head) or _unknown_type(head, size)


def _zip_type(path: Path, size: int) -> FileType:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return FileType(
            None,
            f"a truncated or damaged torch file or zip archive (its end, which lists what is in it, is missing after "
            f"{size:,} bytes)",
            _AGAIN,
        )
    parts = {name.rsplit("/", 1)[-1] for name in names}
    if "constants.pkl" in parts:
        remedy = "it contains code; save the state_dict() of the model that it was made from, and take that"
        return FileType(None, "a TorchScript program", remedy)
    if "data.pkl" in parts:
        return FileType("torch", "a torch file", _AGAIN)
    if any(part.endswith(".npy") for part in parts):
        return FileType(None, "an archive of NumPy arrays", "take the file that it was made from")
    return FileType(None, "a zip archive", _unpack(names))


def _archive_type(path: Path, head: bytes) -> FileType | None:
    if tarfile.is_tarfile(path):
        try:
            with tarfile.open(path) as archive:
                names = archive.getnames()
        except (tarfile.TarError, OSError, EOFError):
            return FileType(None, "a truncated or damaged tar archive", _AGAIN)
        return FileType(None, "a tar archive", _unpack(names))
    packers = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
    packers |= {b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR"}
    for magic, name in packers.items():
        if head.startswith(magic):
            return FileType(None, f"compressed by {name}", "unpack it, and take the weights in it")
    others = {b"\x89HDF": "an HDF5 file", b"\x93NUMPY": "a NumPy array", b"GGUF": "a GGUF file"}
    for magic, name in others.items():
        if head.startswith(magic):
            return FileType(None, name, "take the model's safetensors or .pth file")
    return None


def _unpack(names: list[str]) -> str:
    weights = [name for name in names if name.endswith(_WEIGHT_SUFFIXES)]
    if not weights:
        return f"it holds no weights ({', '.join(names[:3]) or 'nothing'}{', ...' if len(names) > 3 else ''})"
    return f"unpack it, and take {weights[0]}{' or another of its weights' if len(weights) > 1 else ''}"


def _text_type(head: bytes) -> FileType | None:
    try:
        text = head.decode("utf-8-sig", errors="strict" if len(head) < _HEAD else "ignore").strip()
    except UnicodeDecodeError:
        return None
    if any(ord(character) < 32 and not character.isspace() for character in text):
        return None
    if text.startswith("version https://git-lfs"):
        size = re.search(r"^size (\d+)", text, re.MULTILINE)
        of = f" of a file of {int(size[1]):,} bytes" if size else ""
        remedy = "`git lfs pull` in its repository puts the file in its place"
        return FileType(None, f"a Git LFS pointer{of}", remedy, True)
    if re.match(r"<(!doctype|html|\?xml|head|error)", text, re.IGNORECASE):
        title = re.search(r"<(title|code|h1)>\s*(.{1,80}?)\s*</", text, re.IGNORECASE | re.DOTALL)
        says = f" that says {' '.join(title[2].split())!r}" if title else ""
        kind = "an answer of a server" if text.startswith(("<?xml", "<Error")) else "a web page"
        remedy = f"log in, or ask for a new link, where it came from, and {_AGAIN}"
        return FileType(None, f"{kind}{says}", remedy, True)
    first = text.splitlines()[0][:60] if text else ""
    if first.startswith("{"):
        remedy = f"name the weights' file, or its folder; or, if this is a server's answer, {_AGAIN}"
        return FileType(None, f"JSON that begins with {first!r}", remedy)
    return FileType(None, f"text that begins with {first!r}", f"it may be a server's answer; {_AGAIN}")


def _unknown_type(head: bytes, size: int) -> FileType:
    if size < 8:
        return FileType(None, f"truncated to {size} bytes", _AGAIN)
    what = f"of no known format ({size:,} bytes, the first of which are {head[:8].hex(' ')})"
    return FileType(None, what, f"it must be a safetensors file or a torch file (.pth, .pt, .bin); {_AGAIN}")
