"""Stored features in a training loop: a teacher that answers from the store, and a torch Dataset with its images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pyarrow import fs as pafs
from torch import Tensor
from torch.utils.data import Dataset

from dinov3_ray.datasets.decode import Decoder, Unreadable, view_digest
from dinov3_ray.datasets.folder import open_path
from dinov3_ray.datasets.sources.reopen import check_there, names_below, reopen_source
from dinov3_ray.datasets.sources.source import FileSource, listing
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


Names = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""Ids, or paths, of stored images."""


class StoredTeacher(TeacherMixin[Images | Names]):
    """A teacher that looks its answers up: :meth:`extract` of stored images, without a forward pass.

    Images are recognised by their pixels: uint8 as they were decoded for the store (see
    :mod:`dinov3_ray.datasets.decode`), or floats that are exactly those divided by 255. Any other view, say a mirrored
    or rescaled one, is refused, since the features of the original would be wrong for it. Alternatively, images are
    named by their ids, on the caller's word that the student sees them as they are.

    Neither needs the images' files, and so they may lie anywhere. With ``images``, the folder in which they lie now,
    paths below it are names too (as in the batches of many detectors), and names are not taken on trust: when an image
    is first named, its file is read there, and must have the pixels that the teacher saw.

    Args:
        store: what to answer from.
        device: of the results.
        images: as :class:`~dinov3_ray.datasets.stored.Originals` takes it; None takes ids at their word.
        filesystem: the pyarrow file system of ``images``, for places without a URI.

    Raises:
        StoreError: nothing is at ``images``.
    """

    def __init__(
        self,
        store: FeatureStore,
        *,
        device: torch.device | str = "cpu",
        images: str | os.PathLike[str] | None = None,
        filesystem: Any = None,
    ) -> None:
        self.store = _check_store(store)
        self._originals = None if images is None else Originals(store, images, filesystem=filesystem)
        self._seen: set[str] = set()
        self.device = as_device(device)
        self._upload = Upload(self.device)
        self._ids_by_view = store.views()

    @property
    def fingerprint(self) -> str | None:
        """Of the teacher that filled the store."""
        return self.store.fingerprint

    def extract(self, images: Images | Names, spec: FeatureSpec, *, ids: Sequence[str] | None = None) -> Features:
        """The stored features of ``images``.

        Args:
            images: pixels, or ids in their place (or paths, where the teacher was told where the images lie).
            spec: at most what the store holds, under the same ``norm`` and ``map_size``. ``native`` gives the dtype
                that the store was asked for; any other narrows or widens that.
            ids: the images' ids, if they are known: their pixels are then compared with these rows alone.

        Raises:
            SpecError: the store does not hold these outputs.
            MissingViewError: the store does not hold one of these views.
            InputError, StoreError: the file of a named image is not there, or has other pixels (with ``images`` only).
            NumericsError: float16 was asked for, and cannot hold the values.
        """
        return self._deliver(self._ids(images, ids), spec)

    def extract_feature_map(self, images: Images | Names) -> Tensor:
        """Patch tokens as a map, float32 [B, D, h, w], of the stored map size; errors as in :meth:`extract`."""
        spec = FeatureSpec(feature_map=True, map_size=self.store.spec.map_size, dtype="float32")
        feature_map = self.extract(images, spec).feature_map
        assert feature_map is not None
        return feature_map

    def __repr__(self) -> str:
        return f"StoredTeacher({self.store!r}, device={str(self.device)!r})"

    def _ids(self, images: Images | Names, ids: Sequence[str] | None) -> list[str]:
        if isinstance(images, (str, os.PathLike)):
            images = [images]
        if isinstance(images, Sequence) and images and isinstance(images[0], (str, os.PathLike)):
            if ids is not None:
                raise StoreError("ids must be left out where the images are named by their ids already")
            return [self._by_name(os.fspath(name)) for name in images]  # type: ignore[arg-type]
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

    def _by_name(self, name: str) -> str:
        id_ = name if self._originals is None else self._originals.id_of(name)
        if id_ not in self.store:
            root = "" if self._originals is None else f", nor is it a path below {self._originals.root}"
            raise MissingViewError(f"the store holds no view {name!r}{root}: {self.store!r}")
        if self._originals is not None and id_ not in self._seen:
            self._originals(id_)
            self._seen.add(id_)
        return id_

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
            image is read from where it was extracted, or from ``images``, uint8 [3,H,W]; see
            :class:`~dinov3_ray.datasets.stored.Originals`.
        ids: a subset, or another order; all of the store's by default.
        images: where the images lie now, if not where they were: another folder, disk or machine.
        filesystem: the pyarrow file system of the images, for places without a URI.

    Raises:
        StoreError: the store has not all of ``ids``, its source has no images to read, or they are not in ``images``.
        ConfigError: both ``read`` and ``images`` are given.
    """

    def __init__(
        self,
        store: FeatureStore,
        read: Callable[[str], Any] | None = None,
        ids: Sequence[str] | None = None,
        *,
        images: str | os.PathLike[str] | None = None,
        filesystem: Any = None,
    ) -> None:
        self.store = _check_store(store)
        self.ids = store.ids if ids is None else tuple(ids)
        for id_ in self.ids:
            store.place(id_)
        if read is not None and images is not None:
            raise ConfigError(f"one of read and images must be given, not both; got images={images!r}")
        if read is None:
            read = Originals(store, images, filesystem=filesystem)
            if images is not None:
                read.check_there(self.ids)
        self.read = read

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

    A file is read, a member of a tar, or a row of a Parquet file (which costs those before it in its row group), from
    where it was, or below ``images`` under the name that it had. What makes it the right one are its pixels: their
    digest must be that of the extraction (:meth:`FeatureStore.view`). May be pickled, and used in DataLoader workers.

    Args:
        store: of a folder, tar shards or Parquet files; or of a Ray Dataset whose ids are paths below ``images``.
        images: the folder (or URI) in which the files lie now, if not where they were. Of a source that was a glob, the
            folder that its names are relative to: ids show them.
        filesystem: the pyarrow file system of the images, for places without a URI.

    Raises:
        StoreError: nothing is at ``images``; or the images came as rows of a Ray Dataset, and it is not given.
    """

    def __init__(
        self, store: FeatureStore, images: str | os.PathLike[str] | None = None, *, filesystem: Any = None
    ) -> None:
        described = store.manifest["source"]
        has_files = "root" in described
        self._moved = images is not None
        if images is None:
            if not has_files:
                raise StoreError(
                    f"the images of {store!r} were rows of a Ray Dataset: read them from there, or, where their ids "
                    "are paths, name the folder that these are relative to (images=...)"
                )
            self._source = reopen_source(described, described["path"], filesystem=filesystem)
        else:
            system, path = open_path(images, filesystem)
            nothing = f"images must be where the images of {store!r} lie now; there is nothing at {path!r}"
            try:
                kind = described if has_files else {"kind": "files"}
                self._source = reopen_source(kind, images, filesystem=filesystem, moved=True)
            except StoreError as error:
                raise StoreError(nothing) from error
            if system.get_file_info(self._source.root).type == pafs.FileType.NotFound:  # of a glob
                raise StoreError(nothing)
        self._store = store
        self._decoder = Decoder.from_rules(store.manifest["decoding"])
        if has_files:
            self._rows = load_rows(store.folder)
        else:
            named = zip(store.ids, names_below(self._source, store.ids), strict=True)
            self._rows = listing((id_, file, 0, 0) for id_, file in named)
        # Where ids are paths of other places, they are not the names of files below the root.
        self._ids: dict[str, str] = (
            {} if has_files else dict(zip(self._rows["file"].to_pylist(), store.ids, strict=True))
        )
        self._places = {id_: place for place, id_ in enumerate(self._rows["id"].to_pylist())}

    @property
    def root(self) -> str:
        """The folder that names of files are relative to."""
        return self._source.root

    def id_of(self, path: str) -> str:
        """The id of the image at ``path``, if that is below :attr:`root`; anything else comes back as it is."""
        if path in self._store or not isinstance(self._source, FileSource):
            return path
        local = self._source.system.type_name == "local"
        name: str = (os.path.abspath(path) if local else path).removeprefix(f"{self.root}/")
        return self._ids.get(name, name)

    def check_there(self, ids: Sequence[str]) -> None:
        """Raise StoreError if none of the files of the first ``ids`` is there: that is another folder."""
        places = [self._places[id_] for id_ in ids]
        told = f"images must hold the files of {self._store!r} under the names that they had below its source."
        check_there(self._source, self._rows.take(places), told=told)

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
            gone = image.kind == "missing" and not self._moved
            remedy = "; if it lies elsewhere now, images=FOLDER says where" if gone else ""
            raise InputError(f"image {id_!r} cannot be read ({image.kind}): {image.detail}{remedy}")
        if view_digest(image) != self._store.view(id_):
            raise StoreError(
                f"image {id_!r} in {self.root} is not the one whose features the store has: its pixels have changed"
            )
        return image
