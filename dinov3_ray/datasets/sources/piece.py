"""Images that are read together, and what becomes of each when it is decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinov3_ray.datasets.decode import Decoder, Unreadable, view_digest
from dinov3_ray.datasets.sources.source import Content, Source

__all__ = ["Decoded", "Piece", "decode_piece"]

_CHUNK_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image among others: uint8 RGB [3,H,W] and its view's digest, or why there are none."""

    position: int
    id: str
    image: np.ndarray | Unreadable
    view: bytes


@dataclass(frozen=True)
class Piece:
    """Images that are read one after the other.

    Attributes:
        first: the position of the first one among others; the rest follow it.
        ids: theirs.
        source: reads them.
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
