"""The teacher's half of an extraction: an actor that turns blocks of images into parts of the store."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov3_ray.config.preprocessing import Preprocessing, Size
from dinov3_ray.datasets.decode import Decoder, Unreadable, UnreadableKind
from dinov3_ray.datasets.extraction.attempts import Attempts
from dinov3_ray.datasets.extraction.blocks import BlockReader
from dinov3_ray.datasets.extraction.decode_tasks import decode_pieces
from dinov3_ray.datasets.extraction.teacher_choice import TeacherChoice
from dinov3_ray.datasets.folder import Folder
from dinov3_ray.datasets.sources.piece import Decoded, Piece
from dinov3_ray.datasets.store.schema import Row, encode_columns
from dinov3_ray.datasets.store.writer import BlockWriter, is_finished
from dinov3_ray.errors import DeviceMemoryError, DinoV3Error, InputError, StoreError
from dinov3_ray.feature_spec import FeatureSpec
from dinov3_ray.teacher import computed_in

if TYPE_CHECKING:
    from dinov3_ray.features import Features
    from dinov3_ray.pool.client.request import Handle

__all__ = ["BlockWorker", "ExtractionJob"]

_BUFFERED_BYTES = 2**28
_AHEAD = 2  # batches submitted for each pass that the teacher makes at a time, before the first is waited for


@dataclass(frozen=True)
class ExtractionJob:
    """All that a worker needs.

    Attributes:
        teacher: computes.
        blocks: reads the images of a block.
        identity: what distinguishes this run from others; it is in the metadata of each part.
        attempts: counts the processes that were to compute a block.
        decode_cpus: that a decoding task reserves.
        window: decoding tasks that each call keeps in flight.
        made_by: the fingerprint of the teacher's results, which is its own, or that of another one inside it.
        rule: by which the teacher brings images to its input: those that come to one size share a batch. None of a
            teacher that does not say it: those of one size do.
    """

    teacher: TeacherChoice
    blocks: BlockReader
    folder: Folder
    identity: Mapping[str, Any]
    spec: FeatureSpec
    decoder: Decoder
    batch_size: int
    attempts: Attempts
    window: int
    decode_cpus: float
    made_by: str | None
    rule: Preprocessing | None


class BlockWorker:
    """Extracts blocks; a callable class for Ray Data, which calls it from several threads.

    One call takes one block: it starts the tasks that decode it, submits what comes to one size to the teacher batch by
    batch, and commits. While one call waits for pixels or writes, another's batches keep the teacher busy.

    Which images share a batch depends on their block alone, never on timing, so that a repeated block gives the same
    bits.
    """

    def __init__(self, job: ExtractionJob) -> None:
        self._job = job
        self._teacher = job.teacher.open(job.batch_size)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``batch`` is a block, as the job's reader takes it.

        This package's own errors are returned, pickled: of one that is raised, Ray Data passes on the words alone.
        """
        given = len(next(iter(batch.values())))
        done = {"block": "", "given": given, "rows": 0, "errors": 0, "bytes": 0, "seconds": 0.0, "computed": False}
        failure = b""
        try:
            name, pieces = self._job.blocks.pieces(batch)
            done["block"] = name
            if pieces and not is_finished(self._job.folder, name):
                self._job.attempts.begin(name)
                try:
                    entry = self._extract(name, pieces)
                finally:
                    self._job.attempts.end(name)
                done |= {"rows": entry["rows"], "errors": len(entry["errors"]), "bytes": entry["bytes"]}
                done |= {"seconds": entry["seconds"], "computed": True}
        except DinoV3Error as error:
            failure = pickle.dumps(error)
        return {"failure": np.array([failure], object), **{key: np.asarray([value]) for key, value in done.items()}}

    def _extract(self, name: str, pieces: Sequence[Piece]) -> dict[str, Any]:
        job = self._job
        writer = BlockWriter(job.folder, name, job.identity)
        running: deque[tuple[list[Decoded], Future[Features] | Handle]] = deque()
        images = decode_pieces(pieces, job.decoder, cpus=job.decode_cpus, window=job.window)
        for batch in self._batches(images, writer):
            running.append((batch, self._submit(batch)))
            if len(running) > _AHEAD * job.teacher.passes:
                self._gather(*running.popleft(), writer)
        while running:
            self._gather(*running.popleft(), writer)
        return writer.commit()

    def _batches(self, images: Iterator[Decoded], writer: BlockWriter) -> Iterator[list[Decoded]]:
        """Readable images by the sizes that they come to, in lists of up to the batch size; the others go to the
        writer's errors."""
        groups: dict[Size, list[Decoded]] = {}
        buffered = 0
        for decoded in images:
            if isinstance(decoded.image, Unreadable):
                writer.fail(decoded.position, decoded.id, decoded.image)
                continue
            view: Size = decoded.image.shape[1:]
            key = view if self._job.rule is None else self._job.rule.input_size(view)
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

    def _submit(self, batch: Sequence[Decoded]) -> Future[Features] | Handle:
        arrays = [_pixels(decoded) for decoded in batch]
        same = len({array.shape for array in arrays}) == 1
        return self._teacher.submit(np.stack(arrays) if same else arrays, self._job.spec.native())

    def _gather(self, batch: Sequence[Decoded], submitted: Future[Features] | Handle, writer: BlockWriter) -> None:
        """Hand a batch's features to the writer. An image that the teacher refuses, or cannot hold, fails alone."""
        try:
            features = submitted.result()
        except (InputError, DeviceMemoryError) as error:
            if len(batch) == 1:
                kind: UnreadableKind = "refused" if isinstance(error, InputError) else "out of memory"
                writer.fail(batch[0].position, batch[0].id, Unreadable(kind, str(error)))
                return
            for decoded in batch:
                self._gather([decoded], self._submit([decoded]), writer)
            return
        shapes = [_pixels(decoded).shape for decoded in batch]
        rows = [Row(decoded.id, shape[1], shape[2], decoded.view) for decoded, shape in zip(batch, shapes, strict=True)]
        writer.add([decoded.position for decoded in batch], rows, self._columns(features))

    def _columns(self, features: Features) -> dict[str, np.ndarray]:
        """``features`` as they are stored.

        Raises:
            StoreError: another teacher made them than the run's plan says.
        """
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


def _pixels(decoded: Decoded) -> np.ndarray:
    assert isinstance(decoded.image, np.ndarray)
    return decoded.image
