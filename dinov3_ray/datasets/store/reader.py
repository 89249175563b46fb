"""Features read back from a store, one image or many at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dinov3_ray.datasets.folder import ERRORS, INDEX, MANIFEST, PARTS, PLAN, Folder
from dinov3_ray.datasets.store.part import INDEX_COLUMNS, Part
from dinov3_ray.datasets.store.schema import Column, check_format, decode_columns, spec_of
from dinov3_ray.errors import StoreError
from dinov3_ray.feature_spec import FeatureSpec

if TYPE_CHECKING:
    from dinov3_ray.features import Features

__all__ = ["ERROR_SCHEMA", "FeatureStore", "errors_table", "index_table"]

ERROR_SCHEMA = pa.schema([("id", pa.string()), ("kind", pa.string()), ("detail", pa.string())])


class FeatureStore:
    """The teacher features of a data set, as :func:`extract` left them.

    Opening a store of any size costs only its index. A row of a local store is copied once, from the page cache into
    the tensors that are returned, which are the caller's own; :meth:`arrays` maps the files, and makes no copy at all.
    Remote stores are read by byte ranges. int8 columns of fewer than 256 values are decoded.

    Instances may be pickled, and used in forked or spawned DataLoader workers and from several threads.

    Args:
        out: the folder that ``extract`` wrote, as a path or a URI that pyarrow takes.
        filesystem: a pyarrow file system, for other places; ``out`` is then a path in it.
        partial: take what is finished of a run that was interrupted, or that is still going on.

    Raises:
        StoreError: ``out`` is not a feature store of this release's format, or its run is not finished.
    """

    def __init__(self, out: str | os.PathLike[str], *, filesystem: Any = None, partial: bool = False) -> None:
        self.folder = Folder.at(out, filesystem)
        """Where it is."""
        plan = self.folder.read_json(PLAN, "fingerprint", "spec", "result_dtype")
        check_format(self.folder.path, plan)
        self.complete = self.folder.exists(MANIFEST)
        if not self.complete and not partial:
            raise StoreError(
                f"the extraction into {self.folder.path} is not finished: run the same command again to go on with "
                "it, or pass partial=True to read what is there"
            )
        self.manifest: dict[str, Any] = self.folder.read_json(MANIFEST, "blocks", "rows") if self.complete else plan
        """fingerprint, spec, preprocessing, versions; counts once the run is finished."""
        self._parts = [
            Part(
                self.folder,
                part["file"],
                part["rows"],
                {name: Column.from_json(value) for name, value in part["columns"].items()},
            )
            for entry in self._ledger()
            for part in entry["parts"]
        ]
        index = self._read_index()
        self.ids: tuple[str, ...] = tuple(index["id"].to_pylist())
        """Of the rows: block by block in the source's order, and in a block by the shape of their outputs; in no order
        of blocks while the source is a Ray Dataset and its run not finished."""
        self._part = index["part"].to_numpy()
        self._row = index["row"].to_numpy()
        self._sizes = np.stack([index["height"].to_numpy(), index["width"].to_numpy()], axis=1)
        self._views = index["view"].to_pylist()
        self._places = {id_: place for place, id_ in enumerate(self.ids)}

    def _ledger(self) -> list[dict[str, Any]]:
        if self.complete:
            entries: list[dict[str, Any]] = self.manifest["blocks"]
            return entries
        return self.folder.ledger()

    def _read_index(self) -> pa.Table:
        if self.complete:
            return self.folder.read_table(INDEX)
        return index_table(self.folder, [part.file for part in self._parts])

    @property
    def fingerprint(self) -> str | None:
        """Of the teacher: which weights, configuration and preprocessing made the features."""
        value: str | None = self.manifest["fingerprint"]
        return value

    @property
    def spec(self) -> FeatureSpec:
        """What the teacher was asked for."""
        return spec_of(self.manifest["spec"])

    @property
    def errors(self) -> pa.Table:
        """The images that have no features: id, kind, detail."""
        if self.complete:
            return self.folder.read_table(ERRORS)
        return errors_table(self._ledger())

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, id_: object) -> bool:
        return id_ in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __getitem__(self, id_: str) -> Features:
        """The features of one image, B = 1, in the dtypes that the teacher's ``extract`` gives.

        Raises:
            StoreError: there is no such image; says so if it was unreadable.
        """
        place = self.place(id_)
        part, row = self._parts[self._part[place]], int(self._row[place])
        return self._decode({name: part.copy_rows(name, row, row + 1) for name in part.columns})

    def read(self, ids: Sequence[str]) -> Features:
        """The features of several images, B = len(ids), in this order.

        Raises:
            StoreError: one of them is missing, there are none, or their outputs differ in shape.
        """
        if isinstance(ids, str) or not len(ids):
            raise StoreError(f"ids must be a sequence of at least one id; got {ids!r}")
        places = [self.place(id_) for id_ in ids]
        shapes = {self._parts[self._part[place]].shapes for place in places}
        if len(shapes) != 1:
            raise StoreError(f"ids must name images whose outputs have one shape to share a batch; got {len(shapes)}")
        return self._read_places(np.asarray(places))

    def arrays(self, id_: str) -> dict[str, np.ndarray]:
        """What is stored of one image, [...] each, read-only; no copy where it is mapped.

        Names are those of the files' columns: ``cls``, ``feature_map``, ``registers``, ``layers_4``, ...; int8 values
        come with their scales, ``feature_map_scale``. Arrays on mapped memory may be unaligned (``flags.aligned``),
        which NumPy takes and torch does not.
        """
        place = self.place(id_)
        part, row = self._parts[self._part[place]], int(self._row[place])
        return {name: part.rows(name, row, row + 1)[0] for name in part.columns}

    def columns(self, id_: str) -> Mapping[str, Column]:
        """The NumPy dtype and shape of what is stored of one image, by name; reads none of it."""
        columns: Mapping[str, Column] = self._parts[self._part[self.place(id_)]].columns
        return columns

    def iter_batches(self, batch_size: int, *, drop_last: bool = False) -> Iterator[tuple[tuple[str, ...], Features]]:
        """All rows in order, as (ids, Features) of up to ``batch_size``.

        Where outputs differ in shape from row to row, a batch ends at the change.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise StoreError(f"batch_size must be an integer, at least 1; got {batch_size!r}")
        shapes = [part.shapes for part in self._parts]
        start = 0
        while start < len(self):
            stop = min(start + batch_size, len(self))
            shape = shapes[self._part[start]]
            others = (place for place in range(start, stop) if shapes[self._part[place]] != shape)
            stop = next(others, stop)
            if stop - start == batch_size or not drop_last:
                yield self.ids[start:stop], self._read_places(np.arange(start, stop))
            start = stop

    def to_datasets(
        self,
        *,
        streaming: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        num_proc: int | None = None,
    ) -> Any:
        """The rows as a dataset of Hugging Face's ``datasets``, in the order of :attr:`ids`.

        Its columns are ``id``, ``height`` and ``width`` of the image, and the outputs: ``cls`` [D] and ``feature_map``
        [D,h,w] (``Array3D``), ``registers`` [R,D], ``layers_4`` [D,h,w], ... Their values are those that the teacher
        gave: int8 is multiplied by its scales, and bfloat16 comes as float32, which holds each of its values.

        datasets maps Arrow files of its own: it writes them once, part by part, to ``cache_dir``, where the same store
        finds them again. They take as many bytes as the store's float values; ``streaming`` writes nothing.

        Args:
            streaming: give an ``IterableDataset``, which reads the store itself: row after row, a part at a time.
            cache_dir: where the Arrow files go; by default, where datasets keeps all of its own.
            num_proc: the number of processes that write them.

        Returns:
            ``datasets.Dataset``, or ``datasets.IterableDataset`` if it is streaming.

        Raises:
            ConfigError: datasets is not installed.
            StoreError: the store has no rows, or rows whose outputs differ in shape; or a part is damaged.
        """
        from dinov3_ray.datasets.store.huggingface import huggingface_dataset  # needs an extra

        self._require_rows("to_datasets")
        if len({part.shapes for part in self._parts}) > 1:
            raise StoreError(
                f"to_datasets needs rows whose outputs have one shape, and those of {self!r} differ: extract with "
                "map_size=(h, w), or take to_ray()"
            )
        return huggingface_dataset(
            self._parts,
            self.manifest["result_dtype"],
            self.digest(),
            streaming=streaming,
            cache_dir=cache_dir,
            num_proc=num_proc,
        )

    def to_ray(self, *, address: str | None = None) -> Any:
        """The rows as a Dataset of Ray Data, in the order of :attr:`ids`; nothing is read before it is used.

        Its columns are ``id``, ``height`` and ``width`` of the image, and the outputs as arrays: ``cls`` [D],
        ``feature_map`` [D,h,w], ``registers`` [R,D], ``layers_4`` [D,h,w], ... Their values are those that the teacher
        gave: int8 is multiplied by its scales, and bfloat16 comes as float32, which holds each of its values. Outputs
        may differ in shape from row to row.

        Its tasks open the store by its path, which all nodes must reach. Rows keep their order through what is done
        with the Dataset; ``dataset.context.execution_options.preserve_order = False`` trades that for speed.

        Args:
            address: the head of a running Ray. By default that which this process is connected to, or the one at
                RAY_ADDRESS, or else one that is started, and ends with the process (or ``ray.shutdown()``).

        Returns:
            ``ray.data.Dataset``.

        Raises:
            StoreError: the store has no rows.
            ConfigError, PoolError: Ray cannot be reached, or does not start.
        """
        from dinov3_ray.datasets.store.datasource import ray_dataset  # here, since Ray takes seconds to import

        self._require_rows("to_ray")
        return ray_dataset(self._parts, self.manifest["result_dtype"], address)

    def digest(self) -> str:
        """Identifies what the store holds: what made it, and its images by ids and pixels; 32 hexadecimal digits.

        It stays the same when the store or its images have moved.
        """
        made = {key: value for key, value in self.manifest.items() if key != "source"}
        state = hashlib.blake2b(json.dumps(made, sort_keys=True).encode(), digest_size=16)
        for id_, view in zip(self.ids, self._views, strict=True):
            state.update(f"{id_}\n".encode() + view)
        return state.hexdigest()

    def place(self, id_: str) -> int:
        """The position of ``id_`` in :attr:`ids`; raises StoreError."""
        try:
            return self._places[id_]
        except (KeyError, TypeError):
            raise StoreError(self._why_missing(id_)) from None

    def original_size(self, id_: str) -> tuple[int, int]:
        """(height, width) of the image as it was decoded."""
        height, width = self._sizes[self.place(id_)]
        return int(height), int(width)

    def view(self, id_: str) -> bytes:
        """The digest of the decoded pixels (see :func:`dinov3_ray.datasets.decode.view_digest`)."""
        view: bytes = self._views[self.place(id_)]
        return view

    def views(self) -> Mapping[bytes, str]:
        """Digest to id; of images with the same pixels, the last."""
        return dict(zip(self._views, self.ids, strict=True))

    def __repr__(self) -> str:
        state = "" if self.complete else ", unfinished"
        return f"FeatureStore({self.folder.path!r}, {len(self)} images, teacher {self.fingerprint}{state})"

    def _require_rows(self, what: str) -> None:
        if not len(self):
            raise StoreError(f"{what} needs a store with rows; got {self!r}")

    def _why_missing(self, id_: object) -> str:
        if not isinstance(id_, str):
            return f"an image's id must be a str (see FeatureStore.ids); got {id_!r}"
        for row in self.errors.to_pylist():
            if row["id"] == id_:
                return f"image {id_!r} has no features, since it could not be read ({row['kind']}): {row['detail']}"
        return f"the store {self.folder.path} has no image {id_!r}; its ids look like {self.ids[:1]}"

    def _decode(self, columns: Mapping[str, np.ndarray]) -> Features:
        return decode_columns(columns, self.manifest["result_dtype"], self.fingerprint)

    def _read_places(self, places: np.ndarray) -> Features:
        """Rows at ``places`` (one shape), copied run by run of rows that stand one after the other."""
        parts, rows = self._part[places], self._row[places]
        breaks = np.flatnonzero((np.diff(parts) != 0) | (np.diff(rows) != 1)) + 1
        runs = list(zip([0, *breaks], [*breaks, len(places)], strict=True))
        columns = {}
        for name, column in self._parts[parts[0]].columns.items():
            batch = np.empty((len(places), *column.shape), np.dtype(column.dtype))
            for start, stop in runs:
                first = int(rows[start])
                self._parts[parts[start]].copy_into(batch[start:stop], name, first, first + int(stop - start))
            columns[name] = batch
        return self._decode(columns)


def index_table(folder: Folder, files: Sequence[str]) -> pa.Table:
    """id, height, width, view, part and row of every image, from the parts themselves."""
    tables = []
    for number, file in enumerate(files):
        table = folder.read_table(f"{PARTS}/{file}", INDEX_COLUMNS)
        place = pa.array(np.full(len(table), number, np.int32)), pa.array(np.arange(len(table), dtype=np.int32))
        tables.append(table.append_column("part", place[0]).append_column("row", place[1]).replace_schema_metadata())
    if tables:
        return pa.concat_tables(tables).combine_chunks()
    fields = [("id", pa.string()), ("height", pa.int32()), ("width", pa.int32()), ("view", pa.binary())]
    return pa.schema([*fields, ("part", pa.int32()), ("row", pa.int32())]).empty_table()


def errors_table(ledger: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The errors of all blocks: id, kind, detail."""
    rows = [error for entry in ledger for error in entry["errors"]]
    return pa.Table.from_pylist(rows, schema=ERROR_SCHEMA)
