"""The images of a store, read again from where they came, as the teacher saw them."""

from __future__ import annotations

from typing import Any

import numpy as np

from dinov3_ray.datasets.decode import Decoder, Unreadable
from dinov3_ray.datasets.opening import reopen_source
from dinov3_ray.datasets.plan import load_rows
from dinov3_ray.datasets.store import FeatureStore
from dinov3_ray.datasets.views import view_digest
from dinov3_ray.errors import InputError, StoreError

__all__ = ["Originals"]


class Originals:
    """Gives the image of an id: uint8 RGB [3,H,W], decoded under the rules of the extraction.

    The source must still be where it was; a file is read, a member of a tar, or a row of a Parquet file (which costs
    those before it in its row group). May be pickled, and used in DataLoader workers.

    Args:
        store: of a folder, tar shards or Parquet files.
        filesystem: the pyarrow file system of the source, for places without a URI.

    Raises:
        StoreError: the images came as rows of a Ray Dataset, which no store can read again.
    """

    def __init__(self, store: FeatureStore, *, filesystem: Any = None) -> None:
        manifest = store.manifest
        described, rules = manifest["source"], manifest["decoding"]
        if "root" not in described:
            raise StoreError(f"the images of {store!r} were rows of a Ray Dataset: read them from there")
        self._store = store
        self._source = reopen_source(described, described["path"], filesystem=filesystem)
        self._decoder = Decoder(rules["max_pixels"], rules["min_side"], tuple(rules["background"]))
        self._rows = load_rows(store.folder)
        self._places = {id_: place for place, id_ in enumerate(self._rows["id"].to_pylist())}

    def __call__(self, id_: str) -> np.ndarray:
        """The image [3,H,W].

        Raises:
            StoreError: the store has no such image, or its pixels are not those that the teacher saw.
            InputError: it cannot be read.
        """
        self._store.place(id_)
        ((_, content),) = self._source.read(self._rows.slice(self._places[id_], 1))
        image = content if isinstance(content, (np.ndarray, Unreadable)) else self._decoder.decode(content)
        if isinstance(image, Unreadable):
            raise InputError(f"image {id_!r} cannot be read from its source ({image.kind}): {image.detail}")
        if view_digest(image) != self._store.view(id_):
            raise StoreError(f"image {id_!r} has changed since its features were extracted: they are not its own")
        return image
