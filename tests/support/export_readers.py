"""What other tools read from an export, in one form for all formats, and what the store gives."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dinov3_ray.datasets import FeatureStore

__all__ = ["READERS", "Rows", "assert_rows", "expected", "rows_of_lance", "rows_of_npy", "tree"]

Rows = dict[str, dict[str, np.ndarray]]
"""By id: the outputs of an image, and its size."""


def rows_of_npy(path: Path) -> Rows:
    found: Rows = {}
    for part in json.loads((path / "export.json").read_text())["parts"]:
        folder = path / part["folder"]
        names = json.loads((folder / "ids.json").read_text())
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}
        sizes = arrays.pop("sizes")
        for place, id_ in enumerate(names):
            found[id_] = {"size": sizes[place]} | {name: array[place] for name, array in arrays.items()}
        assert part["rows"] == len(names)
        assert {name: (array.dtype.name, list(array.shape)) for name, array in arrays.items()} == {
            name: (said["dtype"], said["shape"]) for name, said in part["arrays"].items()
        }
    return found


def rows_of_webdataset(path: Path) -> Rows:
    """As any reader of tar files sees them; the test below reads them with the package webdataset."""
    found: Rows = {}
    for shard in sorted(path.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                content = archive.extractfile(member)
                assert content is not None
                data, name = content.read(), member.name.rpartition("/")[2].partition(".")[2]
                if name == "json":
                    said = json.loads(data)
                    row = found[said["id"]] = {"size": np.array([said["height"], said["width"]], np.int32)}
                else:
                    row[name.removesuffix(".npy")] = np.load(io.BytesIO(data))
    return found


def rows_of_lance(path: Path) -> Rows:
    import lance

    dataset = lance.dataset(str(path))
    assert len(dataset.versions()) == 1
    table = dataset.take(list(range(dataset.count_rows())))
    found: Rows = {}
    for place, id_ in enumerate(table["id"].to_pylist()):
        row = found[id_] = {"size": np.array([table["height"][place].as_py(), table["width"][place].as_py()], np.int32)}
        for field in table.schema:
            if field.name in ("id", "height", "width") or field.name.endswith("_shape"):
                continue
            values, shape = table[field.name][place].values, []
            kind = field.type
            if f"{field.name}_shape" in table.column_names:
                shape, kind = table[f"{field.name}_shape"][place].as_py(), kind.value_type
            while hasattr(kind, "list_size"):
                shape.append(kind.list_size)
                kind = kind.value_type
                values = values.flatten() if hasattr(values, "flatten") else values
            row[field.name] = np.asarray(values.to_numpy()).reshape(shape)
    return found


READERS: dict[str, Callable[[Path], Rows]] = {
    "npy": rows_of_npy,
    "webdataset": rows_of_webdataset,
    "lance": rows_of_lance,
}


def expected(store: FeatureStore, *, stored: bool = False) -> Rows:
    """What the store gives; bfloat16 as float32. ``stored``: the arrays in its files."""
    found: Rows = {}
    for id_ in store:
        size = np.array(store.original_size(id_), np.int32)
        if stored:
            found[id_] = {"size": size, **store.arrays(id_)}
        else:
            named = {name.replace(".", "_"): tensor[0] for name, tensor in store[id_].named()}
            found[id_] = {"size": size} | {
                name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
                for name, tensor in named.items()
            }
    return found


def assert_rows(found: Rows, wanted: Rows) -> None:
    assert list(found) == list(wanted)
    for id_, row in wanted.items():
        assert found[id_].keys() == row.keys()
        for name, array in row.items():
            assert found[id_][name].dtype == array.dtype, name
            assert np.array_equal(found[id_][name], array), (id_, name)


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
