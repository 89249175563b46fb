"""Images that come as rows of a Ray Dataset, and the settings with which Ray Data runs the workers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data.dataset import MaterializedDataset
from ray.util.debug import log_once

from dinov3_ray.datasets.decode import Unreadable
from dinov3_ray.datasets.sources.parquet import ID_COLUMNS, IMAGE_COLUMNS
from dinov3_ray.datasets.sources.source import Content, content_of, key_of
from dinov3_ray.errors import StoreError

__all__ = ["Columns", "DatasetRows", "actor_strategy", "execution", "name_of"]


logger = logging.getLogger("dinov3_ray")

_LOOKED_AT = 8


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of the columns that hold the images and their ids."""

    image: str
    id: str

    def contents(self, batch: Mapping[str, Sequence[Any] | np.ndarray]) -> list[tuple[str, Content]]:
        """The id and content of each row of ``batch``, which has one key per column."""
        pairs = zip(batch[self.id], batch[self.image], strict=True)
        return [(key_of(id_, self.id), content_of(image)) for id_, image in pairs]


class DatasetRows:
    """A Dataset, and what its first rows show.

    Raises:
        StoreError: it has no rows, or not the columns that are asked for or usual.
    """

    def __init__(self, dataset: ray.data.Dataset, image_column: str | None, id_column: str | None) -> None:
        self.dataset = dataset
        with execution(dataset.context, ordered=True):
            rows = dataset.take(_LOOKED_AT)
        if not rows:
            raise StoreError("source must hold images; the Dataset has no rows")
        names = list(rows[0])
        self.columns = Columns(
            _choose_named(names, image_column, IMAGE_COLUMNS, "image_column", ""),
            _choose_named(names, id_column, ID_COLUMNS, "id_column", " (ray.data.read_images has include_paths=True)"),
        )
        self.first = self.columns.contents({name: [row[name] for row in rows] for name in names})
        if all(isinstance(content, Unreadable) and content.kind == "unsupported" for _, content in self.first):
            raise StoreError(
                f"image_column must hold encoded bytes or pixels; {self.columns.image!r} holds "
                f"{type(rows[0][self.columns.image]).__name__} (ray.data.read_binary_files reads what paths name)"
            )
        if any(isinstance(content, np.ndarray) and content.ndim == 2 for _, content in self.first):
            logger.warning(
                "arrays [H,W] of column %r are taken as grey: those of palette images (GIF, some PNG) would be numbers "
                "of colours (ray.data.read_images has mode='RGB')",
                self.columns.image,
            )

    def describe(self) -> dict[str, Any]:
        """What distinguishes this Dataset from others, as far as its first rows do."""
        columns = {"image_column": self.columns.image, "id_column": self.columns.id}
        return {"kind": "dataset", **columns, "first_ids": [id_ for id_, _ in self.first]}

    def count(self) -> int | None:
        """Its rows; None if counting them would mean computing them."""
        return self.dataset.count() if isinstance(self.dataset, MaterializedDataset) else None


def name_of(ids: Sequence[str]) -> str:
    """A block's name, made from its ids: rows of a Dataset have no index."""
    return "k" + hashlib.sha256("\0".join(ids).encode()).hexdigest()[:24]


def _choose_named(names: Sequence[str], given: str | None, usual: Sequence[str], option: str, remedy: str) -> str:
    for name in usual if given is None else (given,):
        if name in names:
            return name
    raise StoreError(f"{option} must name a column of the Dataset; got {given!r}, there are {list(names)}{remedy}")


_CALLS = 3  # an actor's at a time: one waits for pixels, one computes, one writes


def actor_strategy(size: int) -> ray.data.ActorPoolStrategy:
    """For ``map_batches``: a pool of actors that take several calls at a time."""
    return ray.data.ActorPoolStrategy(
        size=size,
        max_tasks_in_flight_per_actor=2 * _CALLS,
        max_concurrent_calls_per_actor=_CALLS,
        enable_true_multi_threading=True,
    )


@contextmanager
def execution(context: ray.data.DataContext, *, ordered: bool) -> Iterator[None]:
    """Without Ray Data's own bars, and with rows in their order where that matters.

    The context is that of the caller's own Dataset, too: it is left as it was.
    """
    options = context.execution_options
    before = context.enable_progress_bars, context.print_on_execution_start, options.preserve_order
    log_once("ray_data_progress_manager_disabled")  # marks as said, amid our own bar, that Ray Data's are off
    context.enable_progress_bars = context.print_on_execution_start = False
    options.preserve_order = ordered
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start, options.preserve_order = before
