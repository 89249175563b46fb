"""Files of sources, and what a source reads of them."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute

from dinov3_ray.datasets.sources.source import Source


def write(root: Path, names: list[str]) -> dict[str, bytes]:
    """Files whose content tells their name; sources never look at it."""
    contents = {name: f"content of {name}".encode() for name in names}
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return contents


def everything(source: Source) -> dict[str, object]:
    """All that a source has, read through pickled copies and slices as the decoding tasks do."""
    found: dict[str, object] = {}
    rows = source.rows()
    copy = pickle.loads(pickle.dumps(source))
    assert sum(len(piece) for piece in source.slices(rows)) == len(rows)
    for file in dict.fromkeys(rows["file"].to_pylist()) if source.by_file else [None]:
        part = rows if file is None else rows.filter(pa.compute.equal(rows["file"], file))
        for piece in source.slices(part):
            for id_, content in copy.read(piece):
                assert id_ not in found
                found[id_] = content
    assert list(found) == rows["id"].to_pylist()
    return found


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
