"""Copy a feature store into a format of other tools, in bounded memory, so that it can be interrupted and resumed."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import pyarrow.parquet as pq

from dinov3_ray.datasets.exports.destination import Destination
from dinov3_ray.datasets.exports.lance import LanceWriter
from dinov3_ray.datasets.exports.npy import NpyWriter
from dinov3_ray.datasets.exports.rows import ExportDtype, StoreRows
from dinov3_ray.datasets.exports.webdataset import ShardWriter
from dinov3_ray.datasets.extraction.plan import Forecast, free_bytes, size_text
from dinov3_ray.datasets.folder import ERRORS, Folder
from dinov3_ray.datasets.meter import metering
from dinov3_ray.datasets.store.reader import FeatureStore
from dinov3_ray.errors import ConfigError, StoreError

__all__ = ["EXPORT_FORMATS", "ExportFormat", "Exported", "export"]

ExportFormat = Literal["lance", "webdataset", "npy"]

EXPORT_FORMATS: tuple[str, ...] = get_args(ExportFormat)

_SHARD_BYTES = 2**28
_FULL = {errno.ENOSPC, errno.EDQUOT}


class ExportWriter(Protocol):
    """Writes rows to a folder in one format, a shard at a time; made of (folder, rows, shard_size).

    Attributes:
        has_shards: whether another ``shard_size`` gives other files.
        row_overhead: bytes per row, at most, besides its values.
    """

    has_shards: bool
    row_overhead: int

    def describe(self) -> dict[str, Any]:
        """What ``export.json`` says of the format's own."""

    def resume(self, done: int) -> int:
        """Take away what is not whole; gives the number of rows that are there, ``done`` of them at least."""

    def write(self, start: int, stop: int) -> None:
        """Add the rows from ``start`` to ``stop``, which begin a shard; they are on the disk when it returns."""

    def finish(self) -> None:
        """All rows are there."""


@dataclass(frozen=True)
class Exported:
    """What an export did.

    Attributes:
        path: where it is.
        manifest: what its ``export.json`` says.
        images: that this call wrote; those that were there are not counted.
        seconds: that it took to write them.
    """

    path: Path
    manifest: dict[str, Any]
    images: int = 0
    seconds: float = 0.0


_WRITERS: dict[str, type[LanceWriter | ShardWriter | NpyWriter]] = {
    "lance": LanceWriter,
    "webdataset": ShardWriter,
    "npy": NpyWriter,
}


def export(
    store: FeatureStore | str | os.PathLike[str],
    to: ExportFormat,
    dest: str | os.PathLike[str] | None = None,
    *,
    dtype: ExportDtype | None = None,
    shard_size: int | None = None,
    progress: bool | None = None,
    check_space: bool = True,
    on_forecast: Callable[[Forecast], None] | None = None,
) -> Exported:
    """Write all rows of ``store`` to ``dest``, in the store's order.

    It grows in the folder ``dest.partial``, and is renamed when all is there. The same call resumes an export that
    ended early, however it ended, and gives what the undisturbed one gives: shards that are whole stay. Memory is
    bounded by a few rows, whatever the size of the store. Images that could not be read have no features and no row:
    ``errors.parquet`` in ``dest`` lists them, as in the store.

    Args:
        store: a finished store, or its folder.
        to: ``lance``: a Lance dataset. ``webdataset``: tar shards, with a JSON and ``.npy`` members for each image.
            ``npy``: a ``.npy`` file per output, [N, ...], with ``ids.json``, and ``sizes.npy`` (int32 [N, 2], height
            and width of the images).
        dest: a local folder, which must not be there yet; by default, the store's with the format as its suffix.
        dtype: of the arrays. By default that in which values are stored, but int8 multiplied by their scales, and
            bfloat16 as float32, which holds each of its values. ``float32`` and ``float16`` convert; ``int8`` gives
            values, and ``<name>_scale``, one float32 scale per token.
        shard_size: images that are written, and kept when it is interrupted, together: a shard of webdataset, a
            fragment of Lance. By default, as many as take about 256 MB; or those of the export that is resumed.
        progress: show a bar; by default, if standard error is a terminal.
        check_space: refuse to start what does not fit the disk.
        on_forecast: called with the forecast before rows are written.

    Raises:
        StoreError: the store is not finished, damaged, or empty; ``dest`` holds something else, or an export of another
            store or with other options, which are named; or its disk is full.
        ConfigError: there is no such format or dtype, or its package is not installed.
        NumericsError: float16 cannot hold a value.
    """
    if to not in EXPORT_FORMATS:
        raise ConfigError(f"to must be one of {', '.join(EXPORT_FORMATS)}; got {to!r}")
    if shard_size is not None and (isinstance(shard_size, bool) or not isinstance(shard_size, int) or shard_size < 1):
        raise ConfigError(f"shard_size must be an integer, at least 1; got {shard_size!r}")
    store = store if isinstance(store, FeatureStore) else FeatureStore(store)
    rows = StoreRows(store, dtype)
    target = Destination.at(_beside(store, to) if dest is None else dest)
    former = target.former()
    row_bytes = sum(layout.row_bytes * len(layout.places) for layout in rows.layouts) // len(rows)
    if former and not _WRITERS[to].has_shards:
        shard_size = former["shard_size"]
    elif shard_size is None:
        shard_size = former["shard_size"] if former else max(1, _SHARD_BYTES // row_bytes)
    identity = {
        "format": 1,
        "to": to,
        "dtype": dtype,
        "shard_size": shard_size,
        # Where its images lie may change.
        "store": {"digest": store.digest()}
        | {key: value for key, value in store.manifest.items() if key not in ("blocks", "source")},
    }
    written = target.check(former, identity)
    writer: ExportWriter = _WRITERS[to](target.partial, rows, shard_size)
    row_bytes += writer.row_overhead
    exact = len(rows.layouts) == 1 and not writer.row_overhead
    forecast = Forecast(len(rows), len(rows) - written, row_bytes, exact, free_bytes(Folder.at(target.partial)))
    if on_forecast is not None:
        on_forecast(forecast)
    if former and target.is_there:
        return Exported(target.path, former)
    if check_space and not forecast.fits:
        raise StoreError(f"dest must have room for the rows: {forecast} (check_space=False starts all the same)")
    manifest = {**identity, **writer.describe()}
    with target.hold():
        former = target.former()  # again, now that no other process can change it
        written = target.check(former, identity)
        if former and target.is_there:
            target.drop()
            return Exported(target.path, former)
        try:
            if not written:
                target.note(0, manifest)
            written = writer.resume(written)
            with metering(progress, len(rows), written, start="starting", doing="exporting") as meter:
                for start in range(written, len(rows), shard_size):
                    begun = time.monotonic()
                    stop = min(start + shard_size, len(rows))
                    writer.write(start, stop)
                    target.note(stop, manifest)
                    written = stop
                    meter.add(stop - start, (stop - start) * row_bytes, time.monotonic() - begun)
            writer.finish()
            if len(store.errors):
                pq.write_table(store.errors, target.partial / ERRORS)
            return Exported(target.path, target.finish(len(rows), manifest), meter.images, round(meter.seconds, 3))
        except OSError as error:
            raise StoreError(_said(error, target, len(rows) - written, row_bytes)) from error


def _said(error: OSError, target: Destination, remaining: int, row_bytes: int) -> str:
    """What to do about an error of the file system."""
    # Lance has the system's words alone.
    if error.errno in _FULL or any(os.strerror(number) in str(error) for number in _FULL):
        free = free_bytes(Folder.at(target.partial)) or 0
        return (
            f"the disk of {target.partial} is full: {size_text(remaining * row_bytes)} are still to be written, and "
            f"{size_text(free)} are free. Make room, and export again with the same arguments: it goes on from there"
        )
    return f"{target.partial} cannot be written: {error}"


def _beside(store: FeatureStore, to: str) -> str:
    if not store.folder.is_local:
        raise StoreError(f"dest must be given, since {store.folder.path} is not a local folder")
    return f"{store.folder.path}.{to}"
