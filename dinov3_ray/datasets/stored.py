"""Stored features in a training loop: a teacher that answers from the store, and a torch Dataset with its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinov3_ray.datasets.decode import Decoder, Unreadable, view_digest
from dinov3_ray.datasets.sources.open import reopen_source
from dinov3_ray.datasets.store.listing import load_rows
from dinov3_ray.datasets.store.reader import FeatureStore
from dinov3_ray.errors import ConfigError, InputError, MissingViewError, NumericsError, SpecError, StoreError
from dinov3_ray.features import Features, FeatureSpec, deliver
from dinov3_ray.images import ImageBatch, Images
from dinov3_ray.model.device import as_device
from dinov3_ray.model.upload import Upload
from dinov3_ray.teacher import TeacherMixin
from dinov3_ray.watch import has_only_finite

__all__ = ["Originals", "StoredTeacher", "TargetDataset"]


class StoredTeacher(TeacherMixin[Images | str | Sequence[str]]):
    """A teacher that looks its answers up: :meth:`extract` of stored images, without a forward pass.

    Images are recognised by their pixels: uint8 as they were decoded for the store (see
    :mod:`dinov3_ray.datasets.decode`), or floats that are exactly those divided by 255. Any other view, say a mirrored
    or rescaled one, is refused, since the features of the original would be wrong for it. Alternatively, images are
    named by their ids, on the caller's word that the student sees them as they are.

    Args:
        store: what to answer from.
        device: of the results.
    """

    def __init__(self, store: FeatureStore, *, device: torch.device | str = "cpu") -> None:
        self.store = _check_store(store)
        self.device = as_device(device)
        self._upload = Upload(self.device)
        self._ids_by_view = store.views()

    @property
    def fingerprint(self) -> str | None:
        """Of the teacher that filled the store."""
        return self.store.fingerprint

    def extract(
        self, images: Images | str | Sequence[str], spec: FeatureSpec, *, ids: Sequence[str] | None = None
    ) -> Features:
        """The stored features of ``images``.

        Args:
            images: pixels, or ids in their place.
            spec: at most what the store holds, under the same ``norm`` and ``map_size``. ``native`` gives the dtype
                that the store was asked for; any other narrows or widens that.
            ids: the images' ids, if they are known: their pixels are then compared with these rows alone.

        Raises:
            SpecError: the store does not hold these outputs.
            MissingViewError: the store does not hold one of these views.
            NumericsError: float16 was asked for, and cannot hold the values.
        """
        return self._deliver(self._ids(images, ids), spec)

    def extract_feature_map(self, images: Images | str | Sequence[str]) -> Tensor:
        """Patch tokens as a map, float32 [B, D, h, w], of the stored map size; errors as in :meth:`extract`."""
        spec = FeatureSpec(feature_map=True, map_size=self.store.spec.map_size, dtype="float32")
        feature_map = self.extract(images, spec).feature_map
        assert feature_map is not None
        return feature_map

    def __repr__(self) -> str:
        return f"StoredTeacher({self.store!r}, device={str(self.device)!r})"

    def _ids(self, images: Images | str | Sequence[str], ids: Sequence[str] | None) -> list[str]:
        if isinstance(images, str):
            images = [images]
        if isinstance(images, Sequence) and images and isinstance(images[0], str):
            if ids is not None:
                raise StoreError("ids must be left out where the images are named by their ids already")
            for id_ in images:
                if id_ not in self.store:
                    raise MissingViewError(f"the store holds no view {id_!r}: {self.store!r}")
            return [str(id_) for id_ in images]
        batch = ImageBatch.of(images)  # type: ignore[arg-type]
        if ids is not None and len(ids) != len(batch):
            raise StoreError(f"ids must name each image once: got {len(ids)} ids for {len(batch)} images")
        views = [self._digest(image, index) for index, image in enumerate(batch)]
        if ids is None:
            return [self._by_view(view, index) for index, view in enumerate(views)]
        for index, (id_, view) in enumerate(zip(ids, views, strict=True)):
            if id_ not in self.store or self.store.view(id_) != view:
                raise MissingViewError(
                    f"images[{index}] is not the view of {id_!r} that the store holds (augmented, resized, or decoded "
                    "otherwise?): use a live teacher for augmented views"
                )
        return list(ids)

    def _by_view(self, view: bytes, index: int) -> str:
        try:
            return self._ids_by_view[view]
        except KeyError:
            raise MissingViewError(
                f"images[{index}] is not a view that the store holds (augmented, resized, or decoded otherwise?): use "
                "a live teacher for augmented views, or name un-augmented images by their ids"
            ) from None

    @staticmethod
    def _digest(image: Tensor, index: int) -> bytes:
        """The digest of an image's uint8 pixels, whatever form it came in."""
        image = image.cpu()  # not every accelerator has float64
        if image.dtype != torch.uint8:
            levels = (image.double() * 255).round()
            # n/255 up to one rounding (some loaders multiply by 1/255), so that a view which was changed a little is
            # not taken for the stored one; the half types cannot show such changes, and must be exact.
            slack = torch.finfo(image.dtype).eps if image.dtype.itemsize >= 4 else 0.0
            off = ((levels / 255).to(image.dtype) - image).abs().max()
            if not off <= slack or levels.min() < 0 or levels.max() > 255:
                raise MissingViewError(
                    f"images[{index}] is not a view that the store holds: its values are not 8-bit pixels / 255"
                )
            image = levels.to(torch.uint8)
        return view_digest(np.ascontiguousarray(image.numpy()))

    def _deliver(self, ids: Sequence[str], spec: FeatureSpec) -> Features:
        self._check(spec)
        features = self.store.read(ids)
        wanted = [name for name in ("cls", "feature_map", "registers") if getattr(spec, name)]
        wanted += [f"layers.{index}" for index in spec.layers]  # in the order in which they are asked for, as ever
        held = dict(features.named())
        named = {name: held[name] for name in wanted}
        delivered = deliver(Features.from_named(named, features.fingerprint), spec)
        if spec.dtype == "float16" and not has_only_finite(delivered):
            raise NumericsError(
                f"FeatureSpec.dtype must hold what {self.store!r} has; its values exceed float16, which ends at 65504 "
                "(ask for float32, bfloat16 or native)"
            )
        return self._upload.features(delivered)

    def _check(self, spec: FeatureSpec) -> None:
        spec.require_outputs()
        held = self.store.spec
        missing = [name for name in ("cls", "feature_map", "registers") if getattr(spec, name) > getattr(held, name)]
        missing += [f"layers {index}" for index in spec.layers if index not in held.layers]
        if missing:
            raise SpecError(f"the store does not hold {', '.join(missing)}; it was extracted with {held!r}")
        if spec.layers and spec.norm != held.norm:
            raise SpecError(f"FeatureSpec.norm must be {held.norm}, as the store was extracted; got {spec.norm}")
        if (spec.feature_map or spec.layers) and spec.map_size != held.map_size:
            raise SpecError(
                f"FeatureSpec.map_size must be {held.map_size}, as the store was extracted; got {spec.map_size}"
            )


def _check_store(store: object) -> FeatureStore:
    if not isinstance(store, FeatureStore):
        raise ConfigError(f"store must be a FeatureStore; got {store!r} (FeatureStore(folder) opens one)")
    return store


class TargetDataset(Dataset[tuple[Any, Features]]):
    """Pairs each stored image with its features: item i is (image, Features with B = 1).

    Args:
        store: gives the ids, in its order, and the targets.
        read: gives the image (or any sample: pixels and boxes) of an id, upright as the teacher saw it. By default, the
            image is read from where it was extracted, uint8 [3,H,W]; see
            :class:`~dinov3_ray.datasets.stored.Originals`.
        ids: a subset, or another order; all of the store's by default.

    Raises:
        StoreError: the store has not all of ``ids``, or its source has no images to read.
    """

    def __init__(
        self, store: FeatureStore, read: Callable[[str], Any] | None = None, ids: Sequence[str] | None = None
    ) -> None:
        self.store = _check_store(store)
        self.read = Originals(store) if read is None else read
        self.ids = store.ids if ids is None else tuple(ids)
        for id_ in self.ids:
            store.place(id_)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Any, Features]:
        id_ = self.ids[index]
        return self.read(id_), self.store[id_]

    @staticmethod
    def collate(items: Sequence[tuple[Any, Features]]) -> tuple[Any, Features]:
        """For ``DataLoader(collate_fn=...)``: images as tensors, stacked if they are of one shape, else a list."""
        samples, features = zip(*items, strict=True)
        samples = tuple(torch.from_numpy(item) if isinstance(item, np.ndarray) else item for item in samples)
        tensors = all(isinstance(sample, Tensor) and sample.shape == samples[0].shape for sample in samples)
        return (torch.stack(samples) if tensors else list(samples)), Features.cat(features)


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
        self._decoder = Decoder.from_rules(rules)
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
