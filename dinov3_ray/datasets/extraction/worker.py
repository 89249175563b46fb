"""The teacher's half of an extraction: an actor that turns blocks of images into parts of the store."""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from dinov3_ray.config import DinoV3Config
from dinov3_ray.datasets.decode import Decoder, Unreadable
from dinov3_ray.datasets.extraction.decode_tasks import Decoded, Piece, decode_pieces
from dinov3_ray.datasets.folder import Folder
from dinov3_ray.datasets.sources.ray_dataset import Columns, name_of
from dinov3_ray.datasets.sources.source import Source
from dinov3_ray.datasets.store.listing import block_name, load_block
from dinov3_ray.datasets.store.schema import Row, encode_columns
from dinov3_ray.datasets.store.writer import BlockWriter, is_finished
from dinov3_ray.errors import DinoV3Error, InputError, StoreError
from dinov3_ray.features import FeatureSpec
from dinov3_ray.images import ImageBatch
from dinov3_ray.model import DinoV3Teacher
from dinov3_ray.pool.replica.device_pipeline import check_finite
from dinov3_ray.teacher import Extractor, computed_in

__all__ = ["BlockExtractor", "Job", "TeacherFactory"]

_BUFFERED_BYTES = 2**28
_AHEAD = 2  # batches given to each of the teacher's threads before the first of them is waited for


@dataclass(frozen=True)
class TeacherFactory:
    """Makes the teacher in the process that uses it."""

    config: DinoV3Config | None
    factory: Callable[[], Extractor] | None
    device: str
    threads: int | None

    def __call__(self) -> Extractor:
        if self.threads is not None:
            # Ray sets one thread for each CPU that an actor reserves; decoding takes the cores only now and then.
            torch.set_num_threads(min(self.threads, _cores()))
        if self.config is None:
            assert self.factory is not None
            return self.factory()
        return DinoV3Teacher(self.config, self.device)


@dataclass(frozen=True)
class Job:
    """All that an extractor needs.

    Attributes:
        source, columns: one of them, as the images are those of a planned source, or rows of a Ray Dataset.
        passes: that an actor's teacher makes at a time; 1 on a GPU, where one thread does all the work.
        window: decoding tasks a call keeps going.
        finished_ids: a reference to the ids that need no work, for a Ray Dataset.
        made_by: the fingerprint of the teacher's results, which is its own, or that of another one inside it.
        mixes_sizes: whether images of different sizes can share a batch, since the teacher brings them to one.
    """

    teacher: TeacherFactory
    folder: Folder
    identity: Mapping[str, Any]
    spec: FeatureSpec
    decoder: Decoder
    source: Source | None
    batch_size: int
    passes: int
    window: int
    decode_cpus: float
    columns: Columns | None = None
    finished_ids: Any = None
    made_by: str | None = None
    mixes_sizes: bool = False


class BlockExtractor:
    """Extracts blocks; a callable class for Ray Data, which calls it from several threads.

    One call takes one block: it starts the tasks that decode it, gives equal sizes to the teacher batch by batch as
    they come, and commits. While one call waits for pixels or writes, another's batches keep the teacher busy. Calls
    share the threads that use the teacher, of which there is one, unless the teacher is known to be reentrant.

    Which images share a batch depends on their block alone, never on timing, so that a repeated block gives the same
    bits.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._thread = ThreadPoolExecutor(job.passes, thread_name_prefix="teacher")
        self._teacher = self._thread.submit(job.teacher).result()
        self._finished: frozenset[str] = ray.get(job.finished_ids) if job.finished_ids is not None else frozenset()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One row, ``block``, of a planned source; or rows of images of a Ray Dataset.

        This package's own errors are returned, pickled: of one that is raised, Ray Data passes on the words alone.
        """
        given = len(next(iter(batch.values())))
        done = {"block": "", "given": given, "rows": 0, "errors": 0, "bytes": 0, "seconds": 0.0, "computed": False}
        failure = b""
        try:
            planned = self._job.source is not None
            name, pieces = self._planned(int(batch["block"][0])) if planned else self._given(batch)
            done["block"] = name
            if pieces and not is_finished(self._job.folder, name):
                entry = self._extract(name, pieces)
                done |= {"rows": entry["rows"], "errors": len(entry["errors"]), "bytes": entry["bytes"]}
                done |= {"seconds": entry["seconds"], "computed": True}
        except DinoV3Error as error:
            failure = pickle.dumps(error)
        return {"failure": np.array([failure], object), **{key: np.asarray([value]) for key, value in done.items()}}

    def _planned(self, block: int) -> tuple[str, list[Piece]]:
        source = self._job.source
        assert source is not None
        pieces, start = [], 0
        for rows in source.slices(load_block(self._job.folder, block)):
            pieces.append(Piece(start, rows["id"].to_pylist(), source, rows))
            start += len(rows)
        return block_name(block), pieces

    def _given(self, batch: dict[str, np.ndarray]) -> tuple[str, list[Piece]]:
        """The rows that are not finished, under the name of all of them: it is the same when the run is resumed."""
        assert self._job.columns is not None
        contents = self._job.columns.contents(batch)
        rows = [row for row in contents if row[0] not in self._finished]
        whole = Piece(0, [id_ for id_, _ in rows], None, rows)
        step = self._job.batch_size
        pieces = [whole.part(start, start + step) for start in range(0, len(rows), step)]
        return name_of([id_ for id_, _ in contents]), pieces

    def _extract(self, name: str, pieces: Sequence[Piece]) -> dict[str, Any]:
        job = self._job
        writer = BlockWriter(job.folder, name, job.identity)
        running: deque[tuple[list[Decoded], Future[dict[str, np.ndarray]]]] = deque()
        images = decode_pieces(pieces, job.decoder, cpus=job.decode_cpus, window=job.window)
        for batch in self._batches(images, writer):
            running.append((batch, self._thread.submit(self._compute, batch)))
            if len(running) > _AHEAD * job.passes:
                self._gather(*running.popleft(), writer)
        while running:
            self._gather(*running.popleft(), writer)
        return writer.commit()

    def _batches(self, images: Iterator[Decoded], writer: BlockWriter) -> Iterator[list[Decoded]]:
        """Readable images by equal sizes, in lists of up to the batch size; the others go to the writer's errors."""
        groups: dict[tuple[int, ...], list[Decoded]] = {}
        buffered = 0
        for decoded in images:
            if isinstance(decoded.image, Unreadable):
                writer.fail(decoded.position, decoded.id, decoded.image)
                continue
            key = () if self._job.mixes_sizes else decoded.image.shape
            groups.setdefault(key, []).append(decoded)
            buffered += decoded.image.nbytes
            full = key
            if len(groups[key]) < self._job.batch_size:
                if buffered <= _BUFFERED_BYTES:
                    continue
                # Too many pixels wait for company of their size: the largest group goes as it is.
                full = max(groups, key=lambda size: sum(_pixels(member).nbytes for member in groups[size]))
            batch = groups.pop(full)
            buffered -= sum(_pixels(member).nbytes for member in batch)
            yield batch
        yield from groups.values()

    def _compute(self, batch: Sequence[Decoded]) -> dict[str, np.ndarray]:
        """On the teacher's thread: the columns of ``batch``, on the host."""
        arrays = [_pixels(decoded) for decoded in batch]
        same = len({array.shape for array in arrays}) == 1
        images = np.stack(arrays) if same else arrays
        features = self._teacher.extract(images, self._job.spec.native())
        check_finite(features, ImageBatch.of(images))
        columns, result_dtype = encode_columns(features, self._job.spec)
        seen = {"computed_in": computed_in(self._teacher), "result_dtype": result_dtype}
        seen["fingerprint"] = features.fingerprint
        planned = {**self._job.identity, "fingerprint": self._job.made_by}
        found = [
            f"{name} is {value!r}, not {planned[name]!r}" for name, value in seen.items() if value != planned[name]
        ]
        if found:
            raise StoreError(
                f"a store must be of one teacher, but this one is not that of the run's plan: {'; '.join(found)}. Was "
                "the pool reloaded? Do all nodes compute in the same dtype (DinoV3Config(dtype=...) names it)?"
            )
        return columns

    def _gather(self, batch: Sequence[Decoded], future: Future[dict[str, np.ndarray]], writer: BlockWriter) -> None:
        """Hand a batch's features to the writer; an image that the teacher refuses fails alone."""
        try:
            columns = future.result()
        except InputError as error:
            if len(batch) == 1:
                writer.fail(batch[0].position, batch[0].id, Unreadable("refused", str(error)))
                return
            for decoded in batch:
                self._gather([decoded], self._thread.submit(self._compute, [decoded]), writer)
            return
        shapes = [_pixels(decoded).shape for decoded in batch]
        rows = [Row(decoded.id, shape[1], shape[2], decoded.view) for decoded, shape in zip(batch, shapes, strict=True)]
        writer.add([decoded.position for decoded in batch], rows, columns)


def _cores() -> int:
    """That this process may use; where the system cannot say, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pixels(decoded: Decoded) -> np.ndarray:
    assert isinstance(decoded.image, np.ndarray)
    return decoded.image
