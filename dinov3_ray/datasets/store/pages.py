"""A Parquet file in which each tensor column is one contiguous array, which readers can map instead of decoding.

Floats are written uncompressed and PLAIN, one page per column: such a page ends with its values, little-endian.

Parquet has no 1-byte integer. In int8 columns a value is the index of itself in a dictionary, whose 256 entries stand
in the order of the index's bit pattern: index byte and value are the same byte. Parquet stores indices as a mixture of
runs: repeats (a count and the value), and bit-packed stretches, here of 8 bits each, byte for byte. A writer that looks
for repeats makes what follows them unmappable, and pyarrow's cuts stretches at 504 values besides. So pyarrow writes a
placeholder without repeats, whose page has a length that is known, and its indices are then replaced by one single
stretch of all values. Any reader of Parquet decodes that; it takes one byte per value.

A tensor is a list of lists of a fixed size: the one form whose shape pyarrow, Hugging Face's datasets, Polars, Daft and
Lance all understand (datasets refuses ``arrow.fixed_shape_tensor``). In front of its values, a page notes where each
list begins, in :data:`LEVEL_BYTES` per value of a map, whatever the size of the values.

What pyarrow wrote is looked at, not trusted: a column that does not have the expected form (another release might cut
pages otherwise) keeps the form that it has, and readers decode it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["LEVEL_BYTES", "fixed_lists", "unnest", "write_mappable"]

LEVEL_BYTES = 0.25
"""At most, and per value of a tensor of two or more dimensions: Parquet's repetition levels, 2 bits wide."""

_ONE_PAGE = 2**30  # Parquet's page sizes are 32-bit; a block's columns stay far below
_STRETCH = 504  # values; 63 groups of 8, which pyarrow's one-byte header can count
_STRETCH_HEADER = _STRETCH // 8 << 1 | 1
_COMPARED_BYTES = 2**16


def write_mappable(
    plain: Mapping[str, pa.Array],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[bytes, str],
    *,
    as_it_comes: Collection[str] = (),
) -> tuple[pa.Buffer, dict[str, int]]:
    """A file of one row group, and the offset of each tensor column's values in it.

    Args:
        plain: ordinary columns.
        tensors: contiguous arrays [rows, ...], which become the columns that :func:`fixed_lists` makes of them. Names
            have no dots, which separate the fields of a column.
        metadata: of the schema.
        as_it_comes: int8 columns to be left in pyarrow's own form.

    Returns:
        The file, and the offsets; a column without one has to be decoded.
    """
    bytewise = {name for name, array in tensors.items() if array.dtype == np.int8}
    # With fewer values than the dictionary has entries, an index would have fewer bits than a byte.
    replaced = {name for name in bytewise if tensors[name].size >= 256} - set(as_it_comes)
    written = {name: _placeholder(array) if name in replaced else array for name, array in tensors.items()}
    arrays = {name: fixed_lists(array) for name, array in written.items()}
    fields = [pa.field(name, array.type) for name, array in plain.items()]
    fields += [pa.field(name, array.type, nullable=False) for name, array in arrays.items()]
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({**plain, **arrays}, pa.schema(fields, metadata)),
        sink,
        compression="none",
        use_dictionary=[name + ".list.element" * (tensors[name].ndim - 1) for name in bytewise] or False,
        write_statistics=["id"],
        data_page_size=_ONE_PAGE,
        row_group_size=max(1, max((len(array) for array in tensors.values()), default=1)),
    )
    buffer = sink.getvalue()
    content = np.frombuffer(buffer, np.uint8)
    if replaced:
        content = content.copy()
        buffer = pa.py_buffer(content)
    offsets: dict[str, int] = {}
    for name, start, stop in _chunks(buffer):
        if name in replaced:
            offset = _replace_indices(content[start:stop], tensors[name])
            if offset is None:
                return write_mappable(plain, tensors, metadata, as_it_comes={*as_it_comes, name})
        elif name in tensors and name not in bytewise:
            offset = _find_values(content[start:stop], tensors[name])
        else:
            offset = None
        if offset is not None:
            offsets[name] = start + offset
    return buffer, offsets


def fixed_lists(array: np.ndarray) -> pa.Array:
    """An array [rows, ...], contiguous, as lists of lists, whose sizes are its shape; no copy, and no nulls."""
    nested = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        kind = pa.list_(pa.field("element", nested.type, nullable=False), size)
        nested = pa.FixedSizeListArray.from_arrays(nested, type=kind)
    return nested


def unnest(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    """The reverse of :func:`fixed_lists`, of a column that was read."""
    values = column.combine_chunks()
    for _ in shape:
        values = values.flatten()
    array: np.ndarray = values.to_numpy().reshape(len(column), *shape)
    return array


def _chunks(buffer: pa.Buffer) -> list[tuple[str, int, int]]:
    """The name of each column, and where its data pages start and stop."""
    group = pq.read_metadata(pa.BufferReader(buffer)).row_group(0)
    found = []
    for index in range(group.num_columns):
        chunk = group.column(index)
        first = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
        stop = first + chunk.total_compressed_size
        found.append((chunk.path_in_schema.partition(".")[0], chunk.data_page_offset, stop))
    return found


def _find_values(pages: np.ndarray, array: np.ndarray) -> int | None:
    """Where ``array`` stands at the end of ``pages``, if it does: not in several pages, say."""
    start = len(pages) - array.nbytes
    expected = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return start if start > 0 and _same(pages[start:], expected) else None


def _same(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether the bytes are equal; piece by piece, since to compare all at once takes as much memory as they do."""
    pieces = range(0, len(right), _COMPARED_BYTES)
    return all(np.array_equal(left[at : at + _COMPARED_BYTES], right[at : at + _COMPARED_BYTES]) for at in pieces)


def _placeholder(array: np.ndarray) -> np.ndarray:
    """Of the array's shape: 0, 1, ..., 127, -128, ..., -1, again and again; no value is repeated."""
    return np.resize(np.arange(256, dtype=np.uint8).view(np.int8), array.shape)


def _replace_indices(pages: np.ndarray, array: np.ndarray) -> int | None:
    """Put the values of ``array`` into the page of its placeholder; where they are, or None if it looks otherwise."""
    expected = _placeholder_indices(array.size)
    start = len(pages) - len(expected)
    if start <= 0 or not _same(pages[start:], expected):
        return None
    groups = -(-array.size // 8)
    header = _varint(groups << 1 | 1)
    offset = start + 1 + len(header)
    # Stretches of 504 values have more headers than this one has bytes; readers stop at the number of values.
    assert offset + 8 * groups <= len(pages)
    pages[start + 1 :] = 0
    pages[start + 1 : offset] = header
    pages[offset : offset + array.size] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return offset


def _placeholder_indices(count: int) -> np.ndarray:
    """What pyarrow makes of a placeholder's indices: their width in bits, then stretches of 504 with a header each."""
    stretches, rest = divmod(count, _STRETCH)
    padded = -(-rest // 8) * 8
    indices = np.resize(np.arange(256, dtype=np.uint8), count)
    whole = np.empty((stretches, _STRETCH + 1), np.uint8)
    whole[:, 0] = _STRETCH_HEADER
    whole[:, 1:] = indices[: stretches * _STRETCH].reshape(stretches, _STRETCH)
    last = np.zeros(1 + padded if rest else 0, np.uint8)
    if rest:
        last[0] = padded // 8 << 1 | 1
        last[1 : 1 + rest] = indices[count - rest :]
    return np.concatenate([np.array([8], np.uint8), whole.reshape(-1), last])


def _varint(value: int) -> list[int]:
    """7 bits per byte, the lowest first; the top bit means that more bytes follow."""
    digits = []
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return [*digits, value]
