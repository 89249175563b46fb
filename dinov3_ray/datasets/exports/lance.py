"""An export to a Lance dataset, which gives random rows to readers of Lance and LanceDB."""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dinov3_ray.datasets.exports.rows import StoreRows
from dinov3_ray.datasets.store.pages import fixed_lists
from dinov3_ray.datasets.store.schema import METADATA_KEY
from dinov3_ray.errors import ConfigError, StoreError
from dinov3_ray.interrupts import wait

__all__ = ["LanceWriter"]

_BATCH_BYTES = 2**23


class LanceWriter:
    """Appends fragments to a dataset with a row per image: ``id``, ``height``, ``width``, and its outputs.

    Outputs are lists of a fixed size, as in the store. One whose shape differs from row to row is a flat list, beside
    which ``<name>_shape`` has the shape.

    Raises:
        ConfigError: Lance is not installed.
    """

    has_shards = True

    def __init__(self, folder: Path, rows: StoreRows, shard_size: int) -> None:  # noqa: ARG002 - as of other formats
        try:
            import lance
        except ImportError as error:
            raise ConfigError(
                f"to='lance' needs the package pylance: pip install 'dinov3-ray[lance]' ({error})"
            ) from error
        self._lance = lance
        self._path = str(folder)
        self._folder = folder
        self.row_overhead = 0
        self._rows = rows
        names = rows.layouts[0].columns
        self._varying = {name for name in names if len({layout.columns[name] for layout in rows.layouts}) > 1}
        self._batch = max(1, _BATCH_BYTES // max(layout.row_bytes for layout in rows.layouts))
        self._schema = self._read(0, 1).schema

    def describe(self) -> dict[str, Any]:
        return {}

    def resume(self, done: int) -> int:
        """Of a fragment that was cut, nothing is in the dataset; what lies there of its file goes in the end."""
        if not done and not any(self._folder.glob("_versions/*.manifest")):
            return 0
        try:
            return int(self._lance.dataset(self._path).count_rows())
        except (ValueError, OSError) as error:
            raise StoreError(f"{self._path} is damaged: {error}. Delete {self._path}, and start anew") from error

    def write(self, start: int, stop: int) -> None:
        failures: list[BaseException] = []
        ended, left = threading.Event(), threading.Event()

        def batches() -> Iterator[pa.RecordBatch]:
            try:
                for low in range(start, stop, self._batch):
                    if ended.is_set():
                        raise StoreError("interrupted")
                    yield self._read(low, min(low + self._batch, stop))
            except BaseException as error:  # Lance would make text of it
                failures.append(error)
                raise

        def append() -> None:
            reader = pa.RecordBatchReader.from_batches(self._schema, batches())
            try:
                self._lance.write_dataset(reader, self._path, mode="append" if start else "create")
            except BaseException as error:  # noqa: BLE001 - raised below
                failures.append(error)
            finally:
                left.set()

        # Lance's threads call batches(). In the main thread, Ctrl-C would end the wait for them but not them, and they
        # would end the process with a fault as it exits.
        thread = threading.Thread(target=append, name="dinov3-ray-lance")
        thread.start()
        try:
            wait(left.wait)  # a join that is interrupted takes the thread for ended (Python 3.11)
        finally:
            ended.set()
            thread.join()
        if failures:
            raise failures[0]

    def finish(self) -> None:
        """Delete former versions, and files that belong to none: no other process writes here."""
        self._lance.dataset(self._path).cleanup_old_versions(datetime.timedelta(0), delete_unverified=True)

    def _read(self, start: int, stop: int) -> pa.RecordBatch:
        store = self._rows.store
        ids = store.ids[start:stop]
        sizes = np.array([store.original_size(id_) for id_ in ids], np.int32)
        columns = {"id": pa.array(ids, pa.string()), "height": pa.array(sizes[:, 0]), "width": pa.array(sizes[:, 1])}
        rows = [self._rows.read(place) for place in range(start, stop)]
        for name in rows[0]:
            arrays = [row[name] for row in rows]
            if name in self._varying:
                columns |= _as_lists(name, arrays)
            else:
                columns[name] = fixed_lists(np.stack(arrays))
        batch = pa.RecordBatch.from_pydict(columns)
        return batch.replace_schema_metadata({METADATA_KEY: json.dumps(self._identity())})

    def _identity(self) -> Mapping[str, Any]:
        return {key: value for key, value in self._rows.store.manifest.items() if key != "blocks"}


def _as_lists(name: str, arrays: list[np.ndarray]) -> dict[str, pa.Array]:
    """Arrays of several shapes, with the same number of dimensions, as flat lists and their shapes."""
    offsets = np.cumsum([0, *(array.size for array in arrays)], dtype=np.int64)
    flat = np.concatenate([array.reshape(-1) for array in arrays])
    shapes = np.array([array.shape for array in arrays], np.int32)
    return {
        name: pa.LargeListArray.from_arrays(offsets, flat),
        f"{name}_shape": pa.FixedSizeListArray.from_arrays(shapes.reshape(-1), shapes.shape[1]),
    }
