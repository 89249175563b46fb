"""The blocks of a run, which are computed, committed and resumed as wholes: cut from a listing, or from a Ray Dataset.

Both kinds have the same face, so that a run asks once, at the door, which one it has.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError

from dinov3_ray.datasets.extraction.plan import cut_blocks
from dinov3_ray.datasets.folder import Folder
from dinov3_ray.datasets.sources.open import SourceOptions, open_source
from dinov3_ray.datasets.sources.piece import Piece
from dinov3_ray.datasets.sources.ray_dataset import Columns, DatasetRows, name_of
from dinov3_ray.datasets.sources.reopen import check_there, reopen_source
from dinov3_ray.datasets.sources.source import Content, Source
from dinov3_ray.datasets.store.listing import block_name, block_rows, load_block, save_rows
from dinov3_ray.datasets.store.reader import FeatureStore
from dinov3_ray.datasets.store.writer import check_rows, finish
from dinov3_ray.errors import ConfigError, StoreError

__all__ = ["BlockReader", "Blocks", "DatasetBlocks", "ListedBlocks", "open_blocks", "unifying"]

_PROBED_IMAGES = 8


class BlockReader(Protocol):
    """The part of :class:`Blocks` that goes to the workers; picklable."""

    def pieces(self, batch: Mapping[str, np.ndarray]) -> tuple[str, list[Piece]]:
        """The name of the block that Ray Data hands over as ``batch``, and its images; none if nothing is to do."""
        ...


class Blocks(Protocol):
    """The images of a run, cut into blocks."""

    #: Whether Ray Data must keep the order of its rows.
    ordered: bool
    #: Rows that Ray Data passes to a worker in one call.
    rows_per_call: int

    def describe(self) -> dict[str, Any]:
        """What distinguishes these images from others."""
        ...

    def first(self) -> list[Piece]:
        """The first images, one per piece; of a listing that is not resumed."""
        ...

    def cut(self, block_size: int) -> None:
        """Cut the images into blocks of ``block_size``; a resumed run keeps those that it has."""
        ...

    def count(self, finished: Collection[str]) -> tuple[int | None, int | None]:
        """All images, and those of blocks that are not ``finished``; None where counting would mean computing."""
        ...

    def check_finished(self, manifest: Mapping[str, Any]) -> None:
        """Raise StoreError unless the finished store is made of these images, as far as that shows."""
        ...

    def record(self) -> None:
        """Write down what a resumed run needs to know, before the first block is computed.

        Raises:
            StoreError: the images that remain are not there.
        """
        ...

    def todo(self, tasks: int) -> ray.data.Dataset | None:
        """What remains, for Ray Data, prepared by so many tasks at a time; None if nothing does."""
        ...

    def reader(self, batch_size: int) -> BlockReader: ...

    def note(self, result: Mapping[str, Any]) -> None:
        """Record the result of a finished block."""
        ...

    def finish(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Write the index, the errors and the manifest, which is returned.

        Raises:
            StoreError: ids are not unique, or rows are missing.
        """
        ...


def open_blocks(
    source: str | os.PathLike[str] | ray.data.Dataset,
    options: SourceOptions,
    folder: Folder,
    old: Mapping[str, Any] | None,
    *,
    moved: bool = False,
) -> Blocks:
    """The blocks of ``source``, of which the run with the identity ``old`` is resumed where there is one.

    Args:
        moved: whether the files that were listed lie at ``source`` now.

    Raises:
        ConfigError: it is neither a path nor a Dataset.
        StoreError: it has no images.
    """
    if isinstance(source, ray.data.Dataset):
        if moved:
            raise ConfigError("source_moved must be left out where source is a Ray Dataset, which knows its own files")
        with unifying(options.image_column):
            rows = DatasetRows(source, options.image_column, options.id_column)
        return DatasetBlocks(rows, folder)
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"source must be a path, a glob, a URI or a Ray Dataset; got {type(source).__name__}")
    if old is not None and "root" in old["source"]:
        reopened = reopen_source(old["source"], source, **options.columns, moved=moved)
        return ListedBlocks(reopened, folder, resumed=True, moved=moved)
    opened = open_source(source, **options.columns, exclude=folder.path)
    return ListedBlocks(opened, folder, resumed=old is not None)


@dataclass(frozen=True)
class _ListedReader:
    source: Source
    folder: Folder

    def pieces(self, batch: Mapping[str, np.ndarray]) -> tuple[str, list[Piece]]:
        block = int(batch["block"][0])
        pieces, start = [], 0
        for rows in self.source.slices(load_block(self.folder, block)):
            pieces.append(Piece(start, rows["id"].to_pylist(), self.source, rows))
            start += len(rows)
        return block_name(block), pieces


class ListedBlocks:
    """Blocks of a source that was listed: by this run, or by the one that is resumed, whose listing is kept."""

    ordered = False
    rows_per_call = 1

    def __init__(self, source: Source, folder: Folder, *, resumed: bool, moved: bool = False) -> None:
        self._source, self._folder, self._moved = source, folder, moved
        self._listed: pa.Table | None = None if resumed else source.rows()
        if self._listed is not None and not len(self._listed):
            raise StoreError(f"source must hold images; the files of {source.describe()['path']!r} have none")
        self._spans: list[tuple[int, int]] = []
        self._todo: list[int] = []

    def describe(self) -> dict[str, Any]:
        return self._source.describe()

    def first(self) -> list[Piece]:
        assert self._listed is not None
        # take(), not slice(): a slice is pickled with all of the listing.
        rows = [self._listed.take([index]) for index in range(min(_PROBED_IMAGES, len(self._listed)))]
        return [Piece(0, row["id"].to_pylist(), self._source, row) for row in rows]

    def cut(self, block_size: int) -> None:
        if self._listed is not None:
            self._spans = cut_blocks(self._listed, block_size, by_file=self._source.by_file)

    def count(self, finished: Collection[str]) -> tuple[int, int]:
        kept = self._listed is None
        sizes = block_rows(self._folder) if kept else [stop - start for start, stop in self._spans]
        self._todo = [index for index in range(len(sizes)) if block_name(index) not in finished]
        return sum(sizes), sum(sizes[index] for index in self._todo)

    def check_finished(self, manifest: Mapping[str, Any]) -> None:  # noqa: ARG002 - its listing says how many
        """A finished run reads nothing again: its source need not be there, unless the caller says where it is."""
        if self._moved and len(block_rows(self._folder)):
            check_there(self._source, load_block(self._folder, 0), moved=True)

    def record(self) -> None:
        if self._listed is not None:
            save_rows(self._folder, self._listed, self._spans)
        elif self._todo:
            check_there(self._source, load_block(self._folder, self._todo[0]), moved=self._moved)

    def todo(self, tasks: int) -> ray.data.Dataset | None:  # noqa: ARG002 - there is nothing to prepare
        if not self._todo:
            return None
        return ray.data.from_items([{"block": index} for index in self._todo], override_num_blocks=len(self._todo))

    def reader(self, batch_size: int) -> BlockReader:  # noqa: ARG002 - a listing has its own slices
        return _ListedReader(self._source, self._folder)

    def note(self, result: Mapping[str, Any]) -> None:
        """The names of listed blocks sort as their rows do."""

    def finish(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        return finish(self._folder, identity)


@contextmanager
def unifying(column: str | None = None) -> Iterator[None]:
    """Raise StoreError where Ray Data stumbles over arrays of several dtypes, of which it makes one column."""
    try:
        yield
    except (pa.ArrowException, ValueError, TypeError, RayError) as error:
        words = str(error)
        found = next((line.strip() for line in reversed(words.splitlines()) if _MIXED.search(line)), None)
        if found is None:
            raise
        raise StoreError(
            f"image_column must have arrays of one dtype, and no nulls among them, where the Dataset's own steps join "
            f"blocks (repartition, batches of several); column {column or 'of images'!r} has more: {found}. Remedy: "
            "before these steps, bring all to uint8, or to encoded bytes"
        ) from error


_MIXED = re.compile(r"unify tensor types|unsupported tensor type|tensor.*(null|divergent)|ArrowTensorType.*ArrowTensor")


@dataclass(frozen=True)
class _Packing:
    """A row of a Dataset as one column of bytes: blocks may differ in the types of their cells, and Ray Data, which
    joins them before a worker sees them, makes one type of them or fails.
    """

    columns: Columns

    def __call__(self, row: Mapping[str, Any]) -> dict[str, bytes]:
        return {"row": pickle.dumps((row[self.columns.id], row[self.columns.image]), protocol=5)}

    def contents(self, batch: Mapping[str, np.ndarray]) -> list[tuple[str, Content]]:
        cells = [pickle.loads(row) for row in batch["row"]]  # noqa: S301 - by this run's own tasks
        return self.columns.contents(
            {self.columns.id: [id_ for id_, _ in cells], self.columns.image: [image for _, image in cells]}
        )


@dataclass(frozen=True)
class _DatasetReader:
    packing: _Packing
    batch_size: int
    finished_ids: Any  # a reference: they are many, and the same for all workers

    def pieces(self, batch: Mapping[str, np.ndarray]) -> tuple[str, list[Piece]]:
        """The rows that are not finished, under the name of all of them: it is the same when the run is resumed."""
        contents = self.packing.contents(batch)
        finished: frozenset[str] = ray.get(self.finished_ids)
        rows = [row for row in contents if row[0] not in finished]
        whole = Piece(0, [id_ for id_, _ in rows], None, rows)
        steps = range(0, len(rows), self.batch_size)
        pieces = [whole.part(start, start + self.batch_size) for start in steps]
        return name_of([id_ for id_, _ in contents]), pieces


class DatasetBlocks:
    """Blocks of a Ray Dataset's rows, as they come; a block is known by the ids of its rows."""

    ordered = True

    def __init__(self, rows: DatasetRows, folder: Folder) -> None:
        self._rows, self._folder = rows, folder
        self._finished: frozenset[str] = frozenset()
        self._order: list[str] = []
        self._given = 0
        self.rows_per_call = 0

    def describe(self) -> dict[str, Any]:
        return self._rows.describe()

    def first(self) -> list[Piece]:
        return [Piece(0, [row[0]], None, [row]) for row in self._rows.first]

    def cut(self, block_size: int) -> None:
        self.rows_per_call = block_size

    def count(self, finished: Collection[str]) -> tuple[int | None, int | None]:
        images = self._rows.count()
        if finished:
            # Read from all parts, and so once.
            store = FeatureStore(self._folder.path, filesystem=self._folder.system, partial=True)
            self._finished = frozenset([*store.ids, *store.errors["id"].to_pylist()])
        return images, None if images is None else max(0, images - len(self._finished))

    def check_finished(self, manifest: Mapping[str, Any]) -> None:
        images = self._rows.count()
        if images is not None:
            check_rows(self._folder, images, manifest["rows"] + manifest["errors"])

    def record(self) -> None:
        """A Dataset is read again when it is resumed: nothing of it is kept."""

    def todo(self, tasks: int) -> ray.data.Dataset:
        # They reserve nothing: while one waits until its rows are taken, decoding must find a CPU.
        few = ray.data.TaskPoolStrategy(size=tasks)
        return self._rows.dataset.map(_Packing(self._rows.columns), num_cpus=0, compute=few)

    def reader(self, batch_size: int) -> BlockReader:
        return _DatasetReader(_Packing(self._rows.columns), batch_size, ray.put(self._finished))

    def note(self, result: Mapping[str, Any]) -> None:
        self._order.append(str(result["block"]))
        self._given += int(result["given"])

    def finish(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        return finish(self._folder, identity, order=self._order, given=self._given)
