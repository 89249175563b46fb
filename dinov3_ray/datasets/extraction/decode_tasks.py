"""Reading and decoding as Ray tasks: the CPU half of an extraction. Imports no torch, so that workers start fast.

Tasks are started a few at a time, and what they give is handed on in order. If a task ends its process, or runs
out of memory, its halves are tried, down to the one image whose fault it is. Any other error of a task is not an
image's fault: what is wrong with an image is found and reported without an error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from dinov3_ray.datasets.decode import Decoder, Unreadable
from dinov3_ray.datasets.sources.piece import Decoded, Piece, decode_piece
from dinov3_ray.errors import StoreError

__all__ = ["decode_pieces"]

_STALL_SECONDS = 1800.0


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
