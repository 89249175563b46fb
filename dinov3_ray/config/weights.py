"""The safetensors files of a model directory, and the tensors that their headers list; needs no torch.

The format: eight bytes with the header's length (little endian), a JSON header of name -> dtype, shape and byte range,
then the bytes (https://huggingface.co/docs/safetensors). Reading it here rather than through the library costs few
lines and gives errors that name the file, the tensor and the sizes, and exact byte ranges to fingerprint.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dinov3_ray.config.directory import INDEX_FILE, SINGLE_FILE, conversion_remedy, convert_hint, missing_target
from dinov3_ray.config.filetype import file_type
from dinov3_ray.config.layouts import MASK_TOKEN, layout_of, translate
from dinov3_ray.errors import CheckpointError

__all__ = [
    "FLOATS",
    "INDEX_FILE",
    "SINGLE_FILE",
    "StoredTensor",
    "WeightFiles",
    "canonical_name",
    "read_stored",
    "read_weight_map",
]

_ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = ("F32", "BF16", "F16")
"""The dtypes that a parameter may have, by their names in a safetensors header."""

_MAX_HEADER = 100_000_000  # the library's own limit
# transformers 5.5 moved the blocks into an inner `model`; files keep the names without it, but some writers do not.
_INNER = re.compile(r"^model\.(?=(layer|stages)\.\d)")


def canonical_name(name: str) -> str:
    """A tensor's name as released checkpoints spell it, whichever transformers version named it."""
    return _INNER.sub("", name)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: ``start`` and ``stop`` are its bytes' range in the file; ``key`` is its name there."""

    name: str
    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def read_into(self, buffer: memoryview, offset: int = 0) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset`` on.

        Read, not mapped: a file that changes later must not change, or take away, what was loaded from it; and the
        page faults of a fresh mapping cost four times as much as the copy.

        Raises:
            CheckpointError: the file has become shorter than it was, or cannot be read.
        """
        done = 0
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.start + offset)
                while done < len(buffer):
                    count = stream.readinto(buffer[done:])
                    if not count:
                        raise CheckpointError(f"{self.file} ends within tensor {self.key}: was it rewritten meanwhile?")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {error}") from error


class _ZeroTensor(StoredTensor):
    """A tensor that its file leaves out, and that is zero."""

    def read_into(self, buffer: memoryview, offset: int = 0) -> None:
        del offset
        buffer[:] = bytes(len(buffer))


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weights of one directory: its files and their tensors by canonical name, sorted."""

    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors alone."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @classmethod
    def find(cls, root: Path, *, buffers: bool = False) -> WeightFiles:
        """Find the weights in ``root`` (one file, or an index and its shards, as transformers looks for them).

        Tensors in timm's layout come under transformers' names, each with its own byte range.

        Args:
            root: the model directory.
            buffers: also tensors that no parameter may be, such as integers, which the buffers of some models are.

        Raises:
            CheckpointError: nothing there, a shard missing, a file truncated or damaged, or the index and its shards
                disagreeing. Files are compared with their headers to the byte, so that a truncated one is found here.
        """
        single, index = root / SINGLE_FILE, root / INDEX_FILE
        if single.is_file():
            return cls._of_files((single,), buffers)
        if index.is_file():
            return cls._of_index(index, buffers)
        for path in (single, index):
            if lost := missing_target(path):
                raise CheckpointError(f"{path} {lost}")
        hint = convert_hint(root)
        raise CheckpointError(f"{root} must hold {SINGLE_FILE} or {INDEX_FILE}; found neither{hint and f' ({hint})'}")

    @classmethod
    def _of_index(cls, index: Path, buffers: bool) -> WeightFiles:
        weight_map = read_weight_map(index)
        paths = tuple(index.parent / name for name in sorted(set(weight_map.values())))
        missing = [path.name for path in paths if not path.is_file()]
        for lost in (f"{path} {missing_target(path)}" for path in paths if missing_target(path)):
            raise CheckpointError(lost)
        if missing:
            raise CheckpointError(f"{index} names {len(paths)} shards; missing: {', '.join(missing)}")
        weights = cls._of_files(paths, buffers)
        expected = {canonical_name(key): name for key, name in weight_map.items()}
        found = {name: tensor.file.name for name, tensor in weights.tensors.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise CheckpointError(
                    f"{index} and its shards disagree on {name}: expected in {expected.get(name, 'no shard')}, "
                    f"found in {found.get(name, 'no shard')}"
                )
        return weights

    @classmethod
    def _of_files(cls, paths: tuple[Path, ...], buffers: bool) -> WeightFiles:
        tensors: dict[str, StoredTensor] = {}
        for path in paths:
            for tensor in read_stored(path, buffers=buffers):
                other = tensors.setdefault(tensor.name, tensor)
                if other is not tensor:
                    raise CheckpointError(
                        f"tensor {tensor.name} must be stored once; found as {other.key} in {other.file.name} "
                        f"and as {tensor.key} in {path.name}"
                    )
        if layout_of(tensors) == "timm":
            tensors = _translated(tensors, str(paths[0].parent))
        return cls(paths, dict(sorted(tensors.items())))


def _translated(tensors: dict[str, StoredTensor], where: str) -> dict[str, StoredTensor]:
    found = translate({name: tensor.shape for name, tensor in tensors.items()}, where)
    result: dict[str, StoredTensor] = {}
    for name, part in found.parts.items():
        whole = tensors[part.key]
        third = whole.nbytes // 3 if part.third is not None else whole.nbytes
        start = whole.start + third * (part.third or 0)
        result[name] = replace(whole, name=name, shape=part.shape, start=start, stop=start + third)
    if found.mask_token is not None:
        like = result["embeddings.cls_token"]
        result[MASK_TOKEN] = _ZeroTensor(
            MASK_TOKEN, MASK_TOKEN, like.file, like.dtype, found.mask_token, 0, like.nbytes
        )
    return result


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as ``model.safetensors.index.json`` names it.

    Raises:
        CheckpointError: the file is missing or damaged, or names a file that is not beside it.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if index.is_file() and (found := file_type(index)).substitute:
            raise CheckpointError(f"{index} must be a JSON object with a weight_map, but is {found}") from error
        raise CheckpointError(f"{index} must be a JSON object with a weight_map; got {error!r}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map tensor names to files; got {weight_map!r}")
    for key, name in weight_map.items():
        # A name with a folder in it could point anywhere on the machine.
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: weight_map[{key!r}] must be a file name in that directory; got {name!r}")
    return weight_map


def read_stored(path: Path, *, buffers: bool = False) -> list[StoredTensor]:
    """The tensors that the header of a safetensors file lists, in the order of their bytes, under their own names.

    Args:
        path: the file.
        buffers: as for :meth:`WeightFiles.find`.

    Raises:
        CheckpointError: the file is truncated or damaged, or is another thing, which the message says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                _refuse_other(path)
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file: it has {size:,} bytes, "
                    f"its first eight promise a header of {length:,}; download it again"
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        if (found := file_type(path)).substitute:
            raise CheckpointError(f"{path} is not a safetensors file, but {found}") from error
        raise CheckpointError(f"{path} has a damaged safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged safetensors header: it holds no object")
    data_start = 8 + length
    entries = [(key, entry) for key, entry in header.items() if key != "__metadata__"]
    allowed = tuple(_ITEM_BYTES) if buffers else FLOATS
    tensors = [_stored(path, key, entry, data_start, allowed) for key, entry in entries]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            raise CheckpointError(f"{path}: tensor {tensor.key} must start at byte {end:,}; found {tensor.start:,}")
        end = tensor.stop
    if end != size:
        what = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(f"{path} is {what}: expected {end:,} bytes, found {size:,}; download it again")
    return tensors


def _refuse_other(path: Path) -> None:
    """Refuse a file that is not one of safetensors at all, by saying what it is."""
    found = file_type(path)
    if found.format == "torch":
        raise CheckpointError(f"{path} is not a safetensors file, but {found.what}: {conversion_remedy(path)}")
    if found.format is None:
        raise CheckpointError(f"{path} is not a safetensors file, but {found}")


def _stored(path: Path, key: str, entry: Any, data_start: int, allowed: tuple[str, ...]) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], tuple(int(side) for side in entry["shape"])
        start, stop = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry for {key} is damaged: {entry!r}") from error
    if dtype not in allowed:
        raise CheckpointError(f"{path}: tensor {key} must be one of {', '.join(allowed)}; found {dtype}")
    expected = math.prod(shape) * _ITEM_BYTES[dtype]
    if stop - start != expected or min(shape, default=0) < 0:
        raise CheckpointError(
            f"{path}: tensor {key} of {dtype}{list(shape)} must take {expected:,} bytes; found {stop - start:,}"
        )
    return StoredTensor(canonical_name(key), key, path, dtype, shape, data_start + start, data_start + stop)
