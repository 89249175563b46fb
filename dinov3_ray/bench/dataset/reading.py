"""The speed of random rows of a store, beside NumPy's memory maps, Lance, and Hugging Face's ``datasets``.

All read the same rows in the same order from the page cache, and end in torch tensors. Lance reads an export of the
store; ``datasets`` reads the store's Parquet files, and what ``to_datasets`` makes of it.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from dinov3_ray.bench.printout import new_table
from dinov3_ray.datasets import FeatureStore, export
from dinov3_ray.datasets.folder import PARTS, Folder
from dinov3_ray.datasets.store.schema import FORMAT, Row, decode_columns, encode_columns, spec_to_json
from dinov3_ray.datasets.store.writer import BlockWriter, finish
from dinov3_ray.feature_spec import FeatureSpec, ResultDtype
from dinov3_ray.features import Features

__all__ = ["PeerRead", "ReadRate", "measure_peers", "measure_reading", "peers_table", "reading_table"]


_READS = 1000
_BLOCK = 256
_DTYPES: tuple[ResultDtype, ...] = ("float32", "float16", "int8")


@dataclass(frozen=True, slots=True)
class ReadRate:
    """Microseconds per row, medians of the runs; both ways end in torch tensors that the caller owns.

    Attributes:
        dtype: of the stored features.
        rows: of the store.
        reads: per run.
        store: through ``FeatureStore``.
        memmap: from ``numpy.load(mmap_mode="r")``.
    """

    dtype: str
    rows: int
    reads: int
    store: float
    memmap: float

    @property
    def ratio(self) -> float:
        """The store's time over the memory map's."""
        return self.store / self.memmap


def measure_reading(source: Path, folder: Path, repeats: int) -> list[ReadRate]:
    """Copy the store ``source`` in each dtype to ``folder``, and read 1,000 random ids of each copy."""
    original = FeatureStore(source)
    found = []
    for dtype in _DTYPES:
        out = folder / dtype
        columns, result_dtype = _copy_store(original, out, dtype)
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
        # The first run warms up.
        medians = statistics.median(from_store[1:]), statistics.median(from_memmap[1:])
        found.append(ReadRate(dtype, len(store), _READS, *medians))
    return found


def _copy_store(original: FeatureStore, out: Path, dtype: ResultDtype) -> tuple[dict[str, np.ndarray], str]:
    """Write ``original`` to ``out`` in ``dtype``; returns (its columns in the order of its ids, its result dtype)."""
    folder = _new_store(out)
    spec = FeatureSpec(cls=True, feature_map=True, dtype=dtype)
    parts: list[Mapping[str, np.ndarray]] = []
    identity = dict(original.manifest)
    for number, (ids, features) in enumerate(original.iter_batches(_BLOCK)):
        columns, result_dtype = encode_columns(features, spec)
        identity |= {"spec": spec_to_json(spec), "result_dtype": result_dtype, "batch_size": _BLOCK}
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


def _new_store(out: Path) -> Folder:
    folder = Folder.at(out)
    folder.make("parts")
    folder.make("ledger")
    return folder


def reading_table(rates: Sequence[ReadRate], machine: str) -> Table:
    """Microseconds per row of a store, by its dtype, beside memory-mapped arrays."""
    title = "Reading random ids, one at a time, from the page cache"
    table = new_table(title, machine, "stored as", "store, µs", "NumPy memmap, µs", "ratio")
    for rate in rates:
        table.add_row(rate.dtype, f"{rate.store:.0f}", f"{rate.memmap:.0f}", f"{rate.ratio:.2f}")
    return table


_MAP = (384, 14, 14)
_PEERS_READS = 100


@dataclass(frozen=True, slots=True)
class PeerRead:
    """One way to a random row, a map [384,14,14] in float16.

    Attributes:
        name: as the table shows it.
        missing: what to install for it; empty if it is there.
        microseconds: of the median row, one value per run.
    """

    name: str
    missing: str = ""
    microseconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        """Microseconds, the median of the runs; None if it is missing."""
        return statistics.median(self.microseconds) if self.microseconds else None

    def times(self, store: PeerRead) -> float | None:
        """Its time over that of the store."""
        return self.median / store.median if self.median and store.median else None

    def as_dict(self, store: PeerRead) -> dict[str, Any]:
        return asdict(self) | {"median": self.median, "times_the_store": self.times(store)}


_Reader = Callable[[int], Tensor]
"""Gives the map [384,14,14] of the row at a place in the store's order."""


def measure_peers(folder: Path, rows: int, repeats: int) -> list[PeerRead]:
    """Write a store of ``rows`` maps to ``folder``, and read 100 of them in each way, in turn; the store is first."""
    store = _random_store(folder / "store", rows)
    found: list[PeerRead] = []
    readers: list[tuple[PeerRead, _Reader]] = []
    for name, package, extra, make in _WAYS:
        if importlib.util.find_spec(package) is None:
            found.append(PeerRead(name, f"not installed: pip install 'dinov3-ray[{extra}]'"))
            continue
        found.append(PeerRead(name))
        readers.append((found[-1], make(store, folder)))
    places = random.Random(0).choices(range(rows), k=_PEERS_READS)  # noqa: S311 - no secret
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a DataLoader's workers; two that share a row wait for each other
    try:
        expected = [readers[0][1](place) for place in places]
        for turn in range(repeats + 1):
            for peer, read in readers:
                maps, seconds = _timed(read, places)
                if turn:  # the first run warms up
                    peer.microseconds.append(statistics.median(seconds) * 1e6)
                elif not all(map(torch.equal, maps, expected)):
                    raise RuntimeError(f"{peer.name} must give the store's rows")
    finally:
        torch.set_num_threads(threads)
    return found


def _timed(read: _Reader, places: Sequence[int]) -> tuple[list[Tensor], list[float]]:
    maps, seconds = [], []
    for place in places:
        begun = time.perf_counter()
        maps.append(read(place))
        seconds.append(time.perf_counter() - begun)
    return maps, seconds


def peers_table(peers: Sequence[PeerRead]) -> Table:
    """Microseconds and GB/s of each way."""
    title = "Random rows [384,14,14] in float16, one at a time, from the page cache, as torch tensors"
    table = new_table(
        title,
        f"medians of {len(peers[0].microseconds)} runs of {_PEERS_READS} rows",
        "",
        "µs",
        "GB/s",
        "times the store",
    )
    for peer in peers:
        if peer.median is None:
            table.add_row(escape(f"{peer.name} ({peer.missing})"), "-", "-", "-")
            continue
        rate = 2 * np.prod(_MAP) / peer.median / 1e3
        table.add_row(peer.name, f"{peer.median:.0f}", f"{rate:.2f}", f"{peer.times(peers[0]):.2f}")
    return table


def _random_store(out: Path, rows: int) -> FeatureStore:
    folder = _new_store(out)
    spec = FeatureSpec(feature_map=True, dtype="float16")
    identity = {
        "format": FORMAT,
        "fingerprint": None,
        "spec": spec_to_json(spec),
        "result_dtype": "float16",
        "preprocessing": None,
        "batch_size": _BLOCK,
    }
    folder.write_json("plan.json", identity)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, rows, _BLOCK):
        places = range(start, min(start + _BLOCK, rows))
        writer = BlockWriter(folder, f"{start:07}", identity)
        features = Features(feature_map=torch.randn(len(places), *_MAP, generator=generator))
        names = [Row(f"{place:07}.jpg", 375, 500, place.to_bytes(16, "big")) for place in places]
        writer.add(range(len(places)), names, encode_columns(features, spec)[0])
        writer.commit()
    finish(folder, identity)
    return FeatureStore(out)


def _through_store(store: FeatureStore, _folder: Path) -> _Reader:
    def read(place: int) -> Tensor:
        feature_map = store[store.ids[place]].feature_map
        assert feature_map is not None
        return feature_map[0]

    return read


def _through_memmap(store: FeatureStore, folder: Path) -> _Reader:
    path = export(store, "npy", folder / "npy", progress=False).path
    mapped = np.load(path / "feature_map.npy", mmap_mode="r")
    return lambda place: torch.from_numpy(np.array(mapped[place]))


def _through_lance(store: FeatureStore, folder: Path) -> _Reader:
    import lance

    dataset = lance.dataset(str(export(store, "lance", folder / "lance", progress=False).path))
    return lambda place: _flat(dataset.take([place], columns=["feature_map"])["feature_map"])


def _through_datasets(store: FeatureStore, folder: Path) -> _Reader:
    dataset = _quiet(lambda: store.to_datasets(cache_dir=folder / "to_datasets"))
    dataset = dataset.with_format("torch", columns=["feature_map"], dtype=torch.float16)
    return lambda place: dataset[place]["feature_map"]


def _through_load_dataset(store: FeatureStore, folder: Path) -> _Reader:
    import datasets

    options = {"data_files": f"{store.folder.path}/{PARTS}/*.parquet", "cache_dir": str(folder / "load_dataset")}
    dataset = _quiet(lambda: datasets.load_dataset("parquet", split="train", **options))
    # Its other formats make Python lists of lists, which take a thousand times as long.
    dataset = dataset.with_format("arrow", columns=["feature_map"])
    return lambda place: _flat(dataset[place]["feature_map"])


def _flat(column: Any) -> Tensor:
    """A map as Arrow has it, lists of lists of a fixed size, as a tensor of its own."""
    values = column.combine_chunks()
    for _ in _MAP:
        values = values.flatten()
    return torch.from_numpy(np.array(values).reshape(_MAP))


def _quiet(make: Callable[[], Any]) -> Any:
    """What ``make`` gives, without datasets' progress bars."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    disable_progress_bar()
    try:
        return make()
    finally:
        enable_progress_bar()


_WAYS: list[tuple[str, str, str, Callable[[FeatureStore, Path], _Reader]]] = [
    ("FeatureStore", "torch", "", _through_store),
    ("NumPy memmap of an export", "numpy", "", _through_memmap),
    ("Lance, an export", "lance", "lance", _through_lance),
    ("datasets, to_datasets(), format torch", "datasets", "datasets", _through_datasets),
    ("datasets, load_dataset('parquet'), format arrow", "datasets", "datasets", _through_load_dataset),
]
