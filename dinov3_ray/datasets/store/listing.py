"""Keeps the listing of a run's images in its output folder, from which workers read their blocks."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from dinov3_ray.datasets.folder import PLAN_ROWS, Folder

__all__ = ["block_name", "block_rows", "load_block", "load_rows", "save_rows"]


def block_name(index: int) -> str:
    """The name of a planned block; names sort as the blocks do."""
    return f"{index:07}"


def save_rows(folder: Folder, rows: pa.Table, blocks: list[tuple[int, int]]) -> None:
    """Keep the listing, one record batch per block: workers read their blocks, and a resumed run lists nothing."""
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, rows.schema) as writer:
        for start, stop in blocks:
            writer.write_batch(rows.slice(start, stop - start).combine_chunks().to_batches()[0])
    folder.write(PLAN_ROWS, sink.getvalue())


def load_block(folder: Folder, index: int) -> pa.Table:
    """The rows of a block."""
    with _listing(folder) as reader:
        return pa.Table.from_batches([reader.get_batch(index)])


def load_rows(folder: Folder) -> pa.Table:
    """The whole listing."""
    with _listing(folder) as reader:
        return reader.read_all()


def block_rows(folder: Folder) -> list[int]:
    """The number of rows of every block."""
    with _listing(folder) as reader:
        return [reader.get_batch(index).num_rows for index in range(reader.num_record_batches)]


@contextmanager
def _listing(folder: Folder) -> Iterator[Any]:
    try:
        with folder.system.open_input_file(folder.join(PLAN_ROWS)) as file:
            yield pa.ipc.open_file(file)
    except (OSError, pa.ArrowException) as error:
        raise folder.damaged(PLAN_ROWS, error) from error
