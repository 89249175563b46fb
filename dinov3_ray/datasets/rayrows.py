"""Images that come as rows of a Ray Dataset: which columns hold them, and what tells one Dataset from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
from ray.data.dataset import MaterializedDataset

from dinov3_ray.datasets.decode import Unreadable
from dinov3_ray.datasets.parquetsource import ID_COLUMNS, IMAGE_COLUMNS
from dinov3_ray.datasets.raydata import execution
from dinov3_ray.datasets.source import Content, content_of, key_of
from dinov3_ray.errors import StoreError

__all__ = ["Columns", "DatasetRows", "name_of"]

_LOOKED_AT = 8


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of the columns that hold the images and their ids."""

    image: str
    id: str

    def contents(self, batch: Mapping[str, Sequence[Any] | np.ndarray]) -> list[tuple[str, Content]]:
        """The id and content of each row of ``batch``, a column a key."""
        pairs = zip(batch[self.id], batch[self.image], strict=True)
        return [(key_of(id_, self.id), content_of(image)) for id_, image in pairs]


class DatasetRows:
    """A Dataset, and what its first rows tell of it.

    Raises:
        StoreError: it has no rows, or not the columns that are asked for or usual.
    """

    def __init__(self, dataset: ray.data.Dataset, image_column: str | None, id_column: str | None) -> None:
        self.dataset = dataset
        with execution(dataset.context, ordered=True):
            rows = dataset.take(_LOOKED_AT)
        if not rows:
            raise StoreError("source must hold images; the Dataset has no rows")
        names = list(rows[0])
        self.columns = Columns(
            _choose(names, image_column, IMAGE_COLUMNS, "image_column", ""),
            _choose(names, id_column, ID_COLUMNS, "id_column", " (ray.data.read_images has include_paths=True)"),
        )
        self.first = self.columns.contents({name: [row[name] for row in rows] for name in names})
        if all(isinstance(content, Unreadable) and content.kind == "unsupported" for _, content in self.first):
            raise StoreError(
                f"image_column must hold encoded bytes or uint8 pixels; {self.columns.image!r} holds "
                f"{type(rows[0][self.columns.image]).__name__} (ray.data.read_binary_files reads what paths name)"
            )

    def describe(self) -> dict[str, Any]:
        """What tells this Dataset from another, as far as its beginning does."""
        columns = {"image_column": self.columns.image, "id_column": self.columns.id}
        return {"kind": "dataset", **columns, "first_ids": [id_ for id_, _ in self.first]}

    def count(self) -> int | None:
        """Its rows; None if counting them would mean computing them."""
        return self.dataset.count() if isinstance(self.dataset, MaterializedDataset) else None


def name_of(ids: Sequence[str]) -> str:
    """Of a block: rows of a Dataset have no place of their own, but ids."""
    return "k" + hashlib.sha256("\0".join(ids).encode()).hexdigest()[:24]


def _choose(names: Sequence[str], given: str | None, usual: Sequence[str], option: str, remedy: str) -> str:
    for name in usual if given is None else (given,):
        if name in names:
            return name
    raise StoreError(f"{option} must name a column of the Dataset; got {given!r}, there are {list(names)}{remedy}")
