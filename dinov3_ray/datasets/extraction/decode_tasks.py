"""Reading and decoding as Ray tasks: the CPU half of an extraction. Imports no torch, so that workers start fast.

Tasks are started a few at a time, and what they give is handed on in order. Of a task that ends its process, or runs
out of memory, halves are tried, down to the one image whose fault it is. Any other error of a task is no image's fault:
what is wrong with an image is found and told without one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from dinov3_ray.datasets.decode import Decoder, Unreadable, view_digest
from dinov3_ray.datasets.sources.source import Content, Source
from dinov3_ray.errors import StoreError

__all__ = ["Decoded", "Piece", "decode_pieces"]

_CHUNK_BYTES = 2**24
_STALL_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image of a block: uint8 RGB [3,H,W] and its view's digest, or why there are none."""

    position: int
    id: str
    image: np.ndarray | Unreadable
    view: bytes


@dataclass(frozen=True)
class Piece:
    """Images of a block that one task reads: those at ``first`` and after.

    Attributes:
        rows: of ``source``'s listing; or, without a source, the images themselves: (id, content) each.
    """

    first: int
    ids: Sequence[str]
    source: Source | None
    rows: Any

    @property
    def positions(self) -> range:
        return range(self.first, self.first + len(self.ids))

    @property
    def is_decoded(self) -> bool:
        """Whether all images are at hand as pixels."""
        return self.source is None and not any(isinstance(content, bytes) for _, content in self.rows)

    def read(self) -> Iterator[tuple[str, Content]]:
        """The id and content of each image, in order."""
        return iter(self.rows) if self.source is None else self.source.read(self.rows)

    def part(self, start: int, stop: int) -> Piece:
        """The images ``start`` to ``stop`` (exclusive) of this piece, read without the others."""
        rows = self.rows[start:stop] if self.source is None else self.rows.slice(start, stop - start)
        return Piece(self.first + start, self.ids[start:stop], self.source, rows)


def decode_pieces(
    pieces: Sequence[Piece], decoder: Decoder, *, cpus: float, window: int, retries: int = 3
) -> Iterator[Decoded]:
    """The images of ``pieces`` in order, decoded by tasks that reserve ``cpus`` each, ``window`` of them at a time.

    ``retries`` are for processes that end through no fault of their images, as when a node is lost.

    Raises:
        StoreError: nothing comes for half an hour.
    """
    if all(piece.is_decoded for piece in pieces):
        # To send pixels to a task and back would cost more than is left to do with them.
        for piece in pieces:
            for chunk in decode_piece(piece, decoder):
                yield from chunk
        return
    waiting = deque(pieces)
    running: deque[tuple[Piece, Any]] = deque()
    while waiting or running:
        while waiting and len(running) < window:
            piece = waiting.popleft()
            running.append((piece, _start(piece, decoder, cpus, retries)))
        yield from _drain(*running.popleft(), decoder, cpus)


def decode_piece(piece: Piece, decoder: Decoder) -> Iterator[list[Decoded]]:
    """The images of ``piece`` in order, a list for about each 16 MiB of pixels, so that memory is bounded."""
    chunk: list[Decoded] = []
    size = 0
    for position, (id_, content) in zip(piece.positions, piece.read(), strict=True):
        image: Any = content
        if isinstance(content, np.ndarray):
            image = decoder.take(content)
        elif not isinstance(content, Unreadable):
            image = decoder.decode(content)
        pixels = 0 if isinstance(image, Unreadable) else image.nbytes
        if chunk and size + pixels > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        size += pixels
        chunk.append(Decoded(position, id_, image, b"" if isinstance(image, Unreadable) else view_digest(image)))
    if chunk:
        yield chunk


_decode_task: Any = ray.remote(decode_piece)  # the name is that of its processes, too


def _start(piece: Piece, decoder: Decoder, cpus: float, retries: int) -> Any:
    options = _decode_task.options(
        num_cpus=cpus,
        num_returns="streaming",
        max_retries=retries,
        # Decoding does not run ahead of the teacher by more than this many chunks per task.
        _generator_backpressure_num_objects=2,
    )
    return options.remote(piece, decoder)


def _drain(piece: Piece, stream: Any, decoder: Decoder, cpus: float) -> Iterator[Decoded]:
    taken = 0
    try:
        for chunk in _chunks(stream, piece):
            yield from chunk
            taken += len(chunk)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.RayTaskError) as error:
        cause = getattr(error, "cause", None)
        if isinstance(error, ray.exceptions.RayTaskError) and not isinstance(cause, MemoryError):
            raise
        left = len(piece.ids) - taken
        if left == 0:
            return
        if left == 1:
            detail = f"{type(error).__name__}, again and again" if cause is None else f"{type(cause).__name__}: {cause}"
            yield Decoded(piece.positions[-1], piece.ids[-1], Unreadable("crashed the decoder", detail), b"")
            return
        middle = taken + left // 2
        for half in (piece.part(taken, middle), piece.part(middle, len(piece.ids))):
            # What is halved again if it fails need not be retried; an image that is to be blamed is.
            yield from _drain(half, _start(half, decoder, cpus, int(len(half.ids) == 1)), decoder, cpus)


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
