"""A store as a source of Ray Data, whose blocks are the store's parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.data.extensions import ArrowTensorArray

from dinov3_ray.datasets.store.part import Part
from dinov3_ray.pool.cluster import connect

__all__ = ["ray_dataset"]


def ray_dataset(parts: Sequence[Part], result_dtype: str, address: str | None) -> ray.data.Dataset:
    """See :meth:`FeatureStore.to_ray`."""
    connect(address, may_start=True)
    dataset = ray.data.read_datasource(_PartsSource(parts, result_dtype))
    dataset.context.execution_options.preserve_order = True
    return dataset


class _PartsSource(Datasource):  # type: ignore[misc] # Ray is treated as untyped
    def __init__(self, parts: Sequence[Part], result_dtype: str) -> None:
        super().__init__()
        self._parts = parts
        self._result_dtype = result_dtype

    def estimate_inmemory_data_size(self) -> int:
        return sum(part.count * part.row_bytes(self._result_dtype) for part in self._parts)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Tasks that read runs of parts; what a part holds is known without reading it."""
        del data_context
        tasks = []
        for run in np.array_split(np.arange(len(self._parts)), min(parallelism, len(self._parts))):
            parts = [self._parts[number] for number in run]
            metadata = BlockMetadata(
                num_rows=sum(part.count for part in parts),
                size_bytes=sum(part.count * part.row_bytes(self._result_dtype) for part in parts),
                input_files=[part.path for part in parts],
                exec_stats=None,
            )
            read = partial(_blocks, parts, self._result_dtype)
            tasks.append(ReadTask(read, metadata, per_task_row_limit=per_task_row_limit))
        return tasks


def _blocks(parts: Sequence[Part], result_dtype: str) -> Iterator[pa.Table]:
    for part in parts:
        columns = part.load(result_dtype)
        yield pa.table({name: _column(values) for name, values in columns.items()})


def _column(values: pa.Array | np.ndarray) -> pa.Array:
    return ArrowTensorArray.from_numpy(values) if isinstance(values, np.ndarray) else values
