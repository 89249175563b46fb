"""The teacher's half of an extraction: an actor that turns blocks of images into parts of the store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import torch

from dinov3_ray.config import DinoV3Config
from dinov3_ray.datasets.decode import Decoder, Unreadable
from dinov3_ray.datasets.decoding import Decoded, Piece, decode_piece, decode_task
from dinov3_ray.datasets.layout import Folder
from dinov3_ray.datasets.parquetsource import ID_COLUMNS, IMAGE_COLUMNS
from dinov3_ray.datasets.plan import block_name, load_block
from dinov3_ray.datasets.schema import Row, encode_columns
from dinov3_ray.datasets.source import Content, Source
from dinov3_ray.datasets.writer import BlockWriter, is_finished
from dinov3_ray.errors import DinoV3Error, InputError, StoreError
from dinov3_ray.features import FeatureSpec
from dinov3_ray.model import DinoV3Teacher
from dinov3_ray.teacher import Extractor, computed_in

__all__ = ["BlockExtractor", "Job", "TeacherFactory", "probe"]

_CHUNK_BYTES = 2**24
_BUFFERED_BYTES = 2**28
_AHEAD = 2  # batches given to each of the teacher's threads before the first of them is waited for
_STALL_SECONDS = 1800.0


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

    @property
    def mixes_sizes(self) -> bool:
        """Whether images of different sizes can share a batch, since the teacher brings them to one."""
        return self.config is not None and self.config.preprocessing.has_fixed_size


@dataclass(frozen=True)
class Job:
    """All that an extractor needs.

    Attributes:
        source: None where the images come as rows of a Ray Dataset.
        passes: that an actor's teacher makes at a time; 1 on a GPU, where one thread does all the work.
        window: decoding tasks a call keeps going.
        finished_ids: a reference to the ids that need no work, for a Ray Dataset.
        made_by: the fingerprint of the teacher's results, which is its own, or that of another one inside it.
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
    image_column: str | None = None
    id_column: str | None = None
    finished_ids: Any = None
    made_by: str | None = None


def probe(teacher: TeacherFactory, spec: FeatureSpec, images: Sequence[np.ndarray]) -> dict[str, Any]:
    """What the teacher says of itself, and the shapes and dtypes of what it gives for the first image it can take.

    ``images`` are uint8 [3,H,W]; where the teacher takes none of them, a grey square stands for them.
    """
    extractor = teacher()
    patch_size = int(getattr(extractor, "patch_size", 1))
    features = None
    for image in images:
        with contextlib.suppress(InputError):  # it will be in the errors, with this reason
            features = extractor.extract(torch.from_numpy(np.array(image))[None], spec.native())
            break
    if features is None:
        features = extractor.extract(torch.full((1, 3, 224, 224), 128, dtype=torch.uint8), spec.native())
    columns, result_dtype = encode_columns(features, spec)
    config = getattr(extractor, "config", None)
    rule = asdict(config.preprocessing) if isinstance(config, DinoV3Config) else None
    found = {
        "fingerprint": getattr(extractor, "fingerprint", None) or features.fingerprint,
        "made_by": features.fingerprint,
        "computed_in": computed_in(extractor),
        # By way of JSON, so that what is compared with a former run's is of the same types.
        "preprocessing": json.loads(json.dumps(rule)),
        "min_side": patch_size,
        "result_dtype": result_dtype,
        "outputs": {
            name: {"dtype": array.dtype.str, "shape": list(array.shape[1:])} for name, array in columns.items()
        },
    }
    close = getattr(extractor, "close", None)
    if close is not None:  # a pool's client; its process goes on to other work
        close()
    return found


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
        if self._job.source is not None:
            name, pieces = self._planned(int(batch["block"][0]))
        else:
            name, pieces = self._given(batch)
        given = len(next(iter(batch.values())))
        done = {"given": given, "rows": 0, "errors": 0, "bytes": 0, "computed": False}
        failure = b""
        try:
            if pieces and not is_finished(self._job.folder, name):
                entry = self._extract(name, pieces)
                done |= {"rows": entry["rows"], "errors": len(entry["errors"]), "bytes": entry["bytes"]}
                done["computed"] = True
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
        """Rows of a Ray Dataset have no place of their own: the block's name is that of its ids."""
        images = _column(batch, self._job.image_column, IMAGE_COLUMNS, "image_column")
        ids = [str(id_) for id_ in _column(batch, self._job.id_column, ID_COLUMNS, "id_column")]
        rows: list[tuple[str, Content]] = [
            (id_, _content(image)) for id_, image in zip(ids, images, strict=True) if id_ not in self._finished
        ]
        whole = Piece(0, [id_ for id_, _ in rows], None, rows)
        step = self._job.batch_size
        pieces = [whole.part(start, start + step) for start in range(0, len(rows), step)]
        return "k" + hashlib.sha256("\0".join(id_ for id_, _ in rows).encode()).hexdigest()[:24], pieces

    def _extract(self, name: str, pieces: Sequence[Piece]) -> dict[str, Any]:
        writer = BlockWriter(self._job.folder, name, self._job.identity)
        running: deque[tuple[list[Decoded], Future[dict[str, np.ndarray]]]] = deque()
        for batch in self._batches(self._decoded(pieces), writer):
            running.append((batch, self._thread.submit(self._compute, batch)))
            if len(running) > _AHEAD * self._job.passes:
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
            key = () if self._job.teacher.mixes_sizes else decoded.image.shape
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
        features = self._teacher.extract(np.stack(arrays) if same else arrays, self._job.spec.native())
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

    def _decoded(self, pieces: Sequence[Piece]) -> Iterator[Decoded]:
        """The images of ``pieces`` in order, a few pieces being decoded at a time."""
        if all(piece.is_decoded for piece in pieces):
            # To send pixels to a task and back would cost more than is left to do with them.
            for piece in pieces:
                for chunk in decode_piece(piece, self._job.decoder, _CHUNK_BYTES):
                    yield from chunk
            return
        waiting = deque(pieces)
        running: deque[tuple[Piece, Any]] = deque()
        while waiting or running:
            while waiting and len(running) < self._job.window:
                piece = waiting.popleft()
                running.append((piece, self._start(piece, retries=3)))
            yield from self._drain(*running.popleft())

    def _start(self, piece: Piece, *, retries: int) -> Any:
        options = decode_task.options(
            num_cpus=self._job.decode_cpus,
            num_returns="streaming",
            max_retries=retries,
            # Decoding does not run ahead of the teacher by more than this many chunks a task.
            _generator_backpressure_num_objects=2,
        )
        return options.remote(piece, self._job.decoder, _CHUNK_BYTES)

    def _drain(self, piece: Piece, stream: Any) -> Iterator[Decoded]:
        """What a task gives. Of a piece that ends process after process, halves are tried, down to the one image."""
        taken = 0
        try:
            for chunk in _chunks(stream, piece):
                yield from chunk
                taken += len(chunk)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            left = len(piece.ids) - taken
            if left == 0:
                return
            if left == 1:
                trouble = Unreadable("crashed the decoder", f"{type(error).__name__}, again and again")
                yield Decoded(piece.positions[-1], piece.ids[-1], trouble, b"")
                return
            middle = taken + left // 2
            for half in (piece.part(taken, middle), piece.part(middle, len(piece.ids))):
                yield from self._drain(half, self._start(half, retries=1))


def _chunks(stream: Any, piece: Piece) -> Iterator[list[Decoded]]:
    while True:
        ready, _ = ray.wait([stream], timeout=_STALL_SECONDS)
        if not ready:
            raise StoreError(
                f"decoding {piece.ids[0]!r} and the next {len(piece.ids) - 1} images gave nothing for "
                f"{_STALL_SECONDS:.0f} s: is the file system stuck, or has the cluster no CPU left?"
            )
        try:
            reference = next(stream)
        except StopIteration:
            return
        chunk: list[Decoded] = ray.get(reference)
        yield chunk


def _cores() -> int:
    """That this process may use; where the system cannot say, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pixels(decoded: Decoded) -> np.ndarray:
    assert isinstance(decoded.image, np.ndarray)
    return decoded.image


def _content(value: Any) -> Content:
    """A cell of a Ray Dataset's image column."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None:
        return Unreadable("missing", "the row has no image (null)")
    return value if isinstance(value, np.ndarray) else bytes(value)


def _column(batch: Mapping[str, np.ndarray], given: str | None, names: Sequence[str], option: str) -> np.ndarray:
    for name in (given,) if given is not None else names:
        if name in batch:
            return batch[name]
    remedy = " (ray.data.read_images has include_paths=True)" if option == "id_column" else ""
    raise StoreError(f"{option} must name a column of the Dataset; got {given!r}, there are {list(batch)}{remedy}")
