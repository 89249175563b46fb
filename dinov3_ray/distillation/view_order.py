"""Decides by the seed alone which views of which images a step gets, so that a run can begin at any step.

Positions count the views of a run from 0: the batch of step s (from 0) has the positions s·B to s·B + B - 1. Each pass
over the images has an order of its own, and passes follow each other without a gap: a batch may hold the last images of
one and the first of the next.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov3_ray.datasets.decode import Decoder, Unreadable
from dinov3_ray.datasets.sources.open import SourceOptions, open_source
from dinov3_ray.datasets.sources.source import Source
from dinov3_ray.distillation.augmentation import Augmentation
from dinov3_ray.errors import ConfigError, DinoV3Error, StoreError

__all__ = ["Pictures", "ViewDataset", "load_batches", "view_batches"]

_MOST_IN_A_ROW = 256  # unreadable images in a row, in one pass: more are not an accident
_OF_ORDER, _OF_VIEW = 0, 1
_PASSING = "io", "out of memory"  # kinds of trouble that are not the image's, and may be over the next time


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """The images of a source, each read and decoded when it is asked for.

    Attributes:
        source: where they are.
        rows: their listing; see :mod:`dinov3_ray.datasets.sources.source`.
        decoder: makes pixels of them.
    """

    source: Source
    rows: pa.Table
    decoder: Decoder

    @classmethod
    def open(cls, source: str | os.PathLike[str], *, exclude: str | None = None) -> Pictures:
        """List a folder (with its subfolders), a file, a glob, or WebDataset shards.

        Args:
            exclude: a folder within the source that does not belong to it.

        Raises:
            StoreError: nothing is there, or no image.
            ConfigError: it is Parquet.
        """
        opened = open_source(source, exclude=exclude)
        kind = opened.describe()["kind"]
        if kind not in ("files", "webdataset"):
            raise ConfigError(
                f"source must be image files or tar shards, which can be read in random order; {os.fspath(source)!r} "
                f"is {kind} (write its images to files, or to tar shards)"
            )
        return cls(opened, opened.rows(), SourceOptions().decoder())

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return str(self.rows["id"][index].as_py())

    def read(self, index: int) -> Tensor | Unreadable:
        """uint8 RGB [3,H,W], or why there is none.

        Raises:
            StoreError: the image is there, but reading it failed, several times: another in its place would make
                another run of this.
        """
        _, content = next(iter(self.source.read(self.rows.slice(index, 1))))
        if isinstance(content, bytes):
            content = self.decoder.decode(content)
        elif isinstance(content, np.ndarray):
            content = self.decoder.take(content)
        if isinstance(content, Unreadable) and content.kind in _PASSING:
            raise StoreError(
                f"{self.name(index)} is there, but cannot be read: {content.detail} (once it can be, the same command "
                "goes on)"
            )
        return content if isinstance(content, Unreadable) else torch.from_numpy(content)

    def describe(self) -> dict[str, Any]:
        """What distinguishes these images from others: their number, and a digest of their names and sizes."""
        digest = hashlib.sha256()
        for name, size in zip(self.rows["id"].to_pylist(), self.rows["size"].to_pylist(), strict=True):
            digest.update(f"{name}\0{size}\n".encode())
        return {"images": len(self), "listing": digest.hexdigest()[:16]}

    @property
    def is_local(self) -> bool:
        return bool(self.source.system.type_name == "local")


class ViewDataset(Dataset[tuple[Tensor, dict[str, str]]]):
    """The view at a position, uint8 [3,H,W], and what could not be read in its place: why, by name.

    In the place of an image that cannot be read is the next one of the same pass.

    Args:
        pictures: what the views are cropped from.
        augment: makes them.
        seed: of the order of the pictures, and of the views.
    """

    def __init__(self, pictures: Pictures, augment: Augmentation, seed: int) -> None:
        self.pictures, self.augment, self.seed = pictures, augment, seed
        self._pass = -1
        self._order: list[int] = []
        self._unreadable: dict[int, str] = {}

    def __getitem__(self, position: int) -> tuple[Tensor, dict[str, str]]:
        count = len(self.pictures)
        number, place = divmod(position, count)
        if number != self._pass:
            generator = _generator(self.seed, _OF_ORDER, number)
            self._pass, self._order = number, torch.randperm(count, generator=generator).tolist()
        unreadable: dict[str, str] = {}
        for ahead in range(min(count, _MOST_IN_A_ROW)):
            index = self._order[(place + ahead) % count]
            picture = None if index in self._unreadable else self.pictures.read(index)
            if isinstance(picture, Tensor):
                return self.augment(picture, _generator(self.seed, _OF_VIEW, position)), unreadable
            why = self._unreadable[index] if picture is None else f"{picture.kind}: {picture.detail}"
            if picture is not None and picture.kind != "missing":  # a file that is gone may come back
                self._unreadable[index] = why
            unreadable[self.pictures.name(index)] = why
        name, why = next(iter(unreadable.items()))
        raise StoreError(f"source must hold images that can be read; {len(unreadable)} in a row cannot: {name} ({why})")


def _generator(*numbers: int) -> torch.Generator:
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.Generator().manual_seed(int(seed))


@dataclass(frozen=True, slots=True)
class _Steps:
    """The positions of each batch."""

    first: int
    last: int
    batch: int

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            yield list(range(step * self.batch, (step + 1) * self.batch))


def view_batches(
    views: ViewDataset, *, batch: int, first: int, last: int, workers: int, pin: bool = False
) -> DataLoader[Any]:
    """The batches of steps ``first`` (from 0) to ``last`` (exclusive), as dicts: ``images`` [B,3,H,W], ``unreadable``.

    One pass over it is the whole run, so that the teacher's lead is built up once.
    """
    return load_batches(views, _Steps(first, last, batch), _collate, views.pictures, workers=workers, pin=pin)


def load_batches(
    dataset: Dataset[Any], batches: Any, collate: Any, pictures: Pictures, *, workers: int, pin: bool = False
) -> DataLoader[Any]:
    """A DataLoader over ``batches``, lists of indices, which leaves torch's own random numbers alone.

    What this package raises in a worker is raised here as itself: without it, torch wraps it in the worker's traceback.
    """
    # A file system of the network may have threads, which a fork would leave behind.
    context = "spawn" if workers and not pictures.is_local else None
    return _Raising(
        _Caught(dataset),
        batch_sampler=batches,
        collate_fn=partial(_collate_caught, collate),
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),
        multiprocessing_context=context,
    )


class _Caught(Dataset[Any]):
    """A dataset whose errors, those of this package, are items of it."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except DinoV3Error as error:
            return error


def _collate_caught(collate: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, DinoV3Error)), None) or collate(items)


class _Raising(DataLoader[Any]):
    """Raises the errors among its batches."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DinoV3Error):
                raise batch
            yield batch


def _collate(items: list[tuple[Tensor, dict[str, str]]]) -> dict[str, Any]:
    unreadable: dict[str, str] = {}
    for _, found in items:
        unreadable |= found
    return {"images": torch.stack([view for view, _ in items]), "unreadable": unreadable}
