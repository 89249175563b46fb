"""Random rows of a feature store, beside the same rows of memory-mapped NumPy arrays."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dinov3_ray.datasets import FeatureStore
from dinov3_ray.datasets.folder import Folder
from dinov3_ray.datasets.store.schema import Row, decode_columns, encode_columns, spec_to_json
from dinov3_ray.datasets.store.writer import BlockWriter, finish
from dinov3_ray.features import FeatureSpec, ResultDtype

__all__ = ["Reading", "measure_reading"]

_READS = 1000
_BLOCK = 256
_DTYPES: tuple[ResultDtype, ...] = ("float32", "float16", "int8")


@dataclass(frozen=True, slots=True)
class Reading:
    """Microseconds a row, median over the runs: through ``FeatureStore``, and from ``numpy.load(mmap_mode="r")``.

    Both end in torch tensors of the same values, which the caller owns.
    """

    dtype: str
    rows: int
    reads: int
    store: float
    memmap: float

    @property
    def ratio(self) -> float:
        return self.store / self.memmap


def measure_reading(source: Path, folder: Path, repeats: int) -> list[Reading]:
    """Store the features in ``source`` anew in each dtype, under ``folder``, and read 1,000 random ids of each."""
    original = FeatureStore(source)
    found = []
    for dtype in _DTYPES:
        out = folder / dtype
        columns, result_dtype = _store_anew(original, out, dtype)
        store = FeatureStore(out)
        mapped = {}
        for name, array in columns.items():
            np.save(folder / f"{dtype}-{name}.npy", array)
            mapped[name] = np.load(folder / f"{dtype}-{name}.npy", mmap_mode="r")
        places = random.Random(0).choices(range(len(store)), k=_READS)  # noqa: S311 - no secret
        ids = [store.ids[place] for place in places]
        from_store, from_memmap = [], []
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            for id_ in ids:
                store[id_]
            between = time.perf_counter()
            for place in places:
                _row(mapped, place, result_dtype)
            from_store.append((between - begun) / _READS * 1e6)
            from_memmap.append((time.perf_counter() - between) / _READS * 1e6)
        # The first warms up.
        medians = statistics.median(from_store[1:]), statistics.median(from_memmap[1:])
        found.append(Reading(dtype, len(store), _READS, *medians))
    return found


def _store_anew(original: FeatureStore, out: Path, dtype: ResultDtype) -> tuple[dict[str, np.ndarray], str]:
    """The columns of the new store, in the order of its ids, and its result dtype."""
    folder = Folder.at(out)
    folder.make("parts")
    folder.make("ledger")
    spec = FeatureSpec(cls=True, feature_map=True, dtype=dtype)
    parts: list[Mapping[str, np.ndarray]] = []
    identity = dict(original.manifest)
    for number, (ids, features) in enumerate(original.iter_batches(_BLOCK)):
        columns, result_dtype = encode_columns(features, spec)
        identity |= {"spec": spec_to_json(spec), "result_dtype": result_dtype}
        writer = BlockWriter(folder, f"{number:07}", identity)
        rows = [Row(id_, *original.original_size(id_), original.view(id_)) for id_ in ids]
        writer.add(range(len(ids)), rows, columns)
        writer.commit()
        parts.append(columns)
    folder.write_json("plan.json", identity)
    finish(folder, identity)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, identity["result_dtype"]


def _row(mapped: Mapping[str, np.ndarray], place: int, result_dtype: str) -> object:
    row = {name: np.array(array[place : place + 1]) for name, array in mapped.items()}
    if any(array.dtype == np.int8 for array in row.values()):
        return decode_columns(row, result_dtype, None)
    return {name: torch.from_numpy(array) for name, array in row.items()}
