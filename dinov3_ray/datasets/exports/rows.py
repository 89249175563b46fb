"""The rows of a store as an export writes them: NumPy arrays in the dtype that was asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from dinov3_ray.datasets.store.reader import FeatureStore
from dinov3_ray.datasets.store.schema import encode_columns
from dinov3_ray.errors import ConfigError, NumericsError, StoreError
from dinov3_ray.feature_spec import FeatureSpec

__all__ = ["EXPORT_DTYPES", "ExportDtype", "Layout", "StoreRows"]

ExportDtype = Literal["float32", "float16", "int8"]

EXPORT_DTYPES: tuple[str, ...] = get_args(ExportDtype)


@dataclass(frozen=True)
class Layout:
    """Rows whose outputs have the same shapes.

    Attributes:
        columns: name to (NumPy dtype, shape per row).
        places: of the rows in the store's order, ascending.
    """

    columns: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
    places: np.ndarray

    @property
    def row_bytes(self) -> int:
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.columns.values())


class StoreRows:
    """The rows of ``store``, whose outputs have the names of its columns: ``cls``, ``feature_map``, ``layers_4``, ...

    Args:
        store: a finished one.
        dtype: None for that in which values are stored, but int8 values multiplied by their scales, in the result
            dtype. bfloat16 becomes float32, which holds each of its values: NumPy, and so these formats, lack it.
            ``float32`` and ``float16`` convert. ``int8`` gives values, and ``<name>_scale``, one scale per token.

    Raises:
        StoreError: the store is not finished, or has no rows.
        ConfigError: there is no such dtype.
    """

    def __init__(self, store: FeatureStore, dtype: ExportDtype | None) -> None:
        if dtype is not None and dtype not in EXPORT_DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(EXPORT_DTYPES)}, or None; got {dtype!r}")
        if not store.complete:
            raise StoreError(f"store must be finished, since its rows are not settled before; got {store!r}")
        if not len(store):
            raise StoreError(f"store must have rows to export; got {store!r}")
        self.store = store
        self._dtype = dtype
        self._as_stored = self._stores(dtype)
        self.layouts = self._layouts()

    def __len__(self) -> int:
        return len(self.store)

    def read(self, place: int) -> dict[str, np.ndarray]:
        """The outputs of one row, [...] each, to be read only; mapped memory, perhaps unaligned, where it can be.

        Raises:
            NumericsError: float16 cannot hold a value.
        """
        id_ = self.store.ids[place]
        if self._as_stored:
            return self.store.arrays(id_)
        features = self.store[id_]
        if self._dtype == "float32":
            features = features.map(lambda _, tensor: tensor.float())
        try:
            columns, _ = encode_columns(features, FeatureSpec(dtype=self._dtype or "native"))
        except NumericsError as error:
            raise NumericsError(f"{id_!r}: {error}") from error
        return {name: array[0] for name, array in columns.items()}

    def _stores(self, dtype: str | None) -> bool:
        """Whether the store has its values as ``dtype`` asks for them."""
        if self.store.spec.dtype == "int8":
            return dtype == "int8"
        columns = self.store.columns(self.store.ids[0]).values()
        return dtype is None or all(np.dtype(column.dtype) == dtype for column in columns)

    def _layouts(self) -> list[Layout]:
        places: dict[tuple[Any, ...], list[int]] = {}
        for place, id_ in enumerate(self.store.ids):
            columns = self.store.columns(id_)
            places.setdefault(tuple((name, column.shape) for name, column in columns.items()), []).append(place)
        found = []
        for rows in places.values():
            first = self.read(rows[0])
            columns_of_first = {name: (array.dtype, array.shape) for name, array in first.items()}
            found.append(Layout(columns_of_first, np.asarray(rows)))
        return found
