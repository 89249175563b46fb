"""A cache in front of any teacher, keyed by the view that the student sees."""

from __future__ import annotations

import json
import os
import weakref
from dataclasses import asdict
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3_ray.config.preprocessing import Preprocessing
from dinov3_ray.datasets.cache_db import CacheStatistics, FeatureCache
from dinov3_ray.datasets.decode import view_digest
from dinov3_ray.errors import InputError, StoreError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import ImageBatch, Images
from dinov3_ray.model.device import as_device
from dinov3_ray.model.upload import Upload
from dinov3_ray.teacher import Extractor, TeacherMixin, check_extractor, computed_in, least_side
from dinov3_ray.watch import TeacherWatch

__all__ = ["CachedTeacher"]


class CachedTeacher(TeacherMixin[Images]):
    """A teacher that asks ``teacher`` only for views that it has not seen.

    The key of an image is its pixels (with dtype and shape), the teacher's fingerprint, how exactly it computes (if it
    says so) and the spec; a mirrored or cropped view is another key. Images are looked up one by one, so that a view
    hits in whatever batch it comes. What is found has the bits that the teacher once gave. Where only a part of a batch
    is found, the teacher computes a smaller batch, whose last bits may differ from those of the whole one.

    Images on a GPU are copied to the host to be hashed; give the loader's own batch where there is one.

    Args:
        teacher: anything with ``extract``; local, remote or one's own.
        path: a folder on a local disk, which the ranks of a node may share (see :mod:`~dinov3_ray.datasets.cache_db`).
        max_bytes: of the database; least recently used entries leave first.
        fingerprint: what makes the teacher's outputs, for a teacher that does not say so itself.
        queue_bytes: of features that wait to be written; beyond it they are not cached rather than waited for.

    Raises:
        ConfigError: ``teacher`` is not a teacher.
        StoreError: the teacher has no fingerprint, an option is out of range, or the folder is not a cache.
    """

    def __init__(
        self,
        teacher: Extractor,
        path: str | os.PathLike[str],
        max_bytes: float,
        *,
        fingerprint: str | None = None,
        queue_bytes: int = 2**28,
    ) -> None:
        self.teacher = check_extractor(teacher)
        self._fingerprint = fingerprint
        if self.fingerprint is None:
            raise StoreError(
                f"{type(teacher).__name__} has no fingerprint, so that its cached outputs could be taken for another "
                "teacher's: pass fingerprint='...', a name that changes whenever its outputs would"
            )
        self._cache = FeatureCache(path, max_bytes, queue_bytes=queue_bytes)
        # So that a trainer which just ends keeps its last batches.
        self._finalizer = weakref.finalize(self, FeatureCache.close, self._cache, 10.0)
        self._device: torch.device | None = None
        self._upload = Upload(torch.device("cpu"))
        self._watch = TeacherWatch()

    @property
    def fingerprint(self) -> str | None:
        """What makes the outputs: the option, or else what the teacher says now."""
        return self._fingerprint or getattr(self.teacher, "fingerprint", None)

    @property
    def patch_size(self) -> int:
        """Pixels per cell of the teacher's map; 1 where the teacher does not say."""
        return int(getattr(self.teacher, "patch_size", 1))

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How the teacher brings images to its input; None where it does not say."""
        return getattr(self.teacher, "preprocessing", None)

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        """All outputs that ``spec`` asks for, from the cache or from one forward pass over what is missing there.

        Raises:
            NumericsError: the teacher's results are not finite, and are not cached. Of results on a CUDA device, a
                later call raises it.
            Exception: whatever the teacher raises.
        """
        spec.require_outputs()
        batch = ImageBatch.of(images, min_side=least_side(self.teacher))
        keys = self._keys(batch, spec, self.fingerprint)
        found = [self._cache.get(key) for key in keys]
        missing = [index for index, features in enumerate(found) if features is None]
        if not missing:
            self._upload = self._upload_to(self._result_device(batch))
            return self._upload.features(_join([features for features in found if features is not None]))
        live = self.teacher.extract(images if len(missing) == len(batch) else _take(batch, missing), spec)
        if live.fingerprint not in (None, self.fingerprint) and self._fingerprint is None:
            # The pool was reloaded meanwhile, and `found` may be the former teacher's: no batch is of two teachers.
            live, missing = self.teacher.extract(images, spec), list(range(len(batch)))
        if live.fingerprint is not None and self._fingerprint is None:
            keys = self._keys(batch, spec, live.fingerprint, keys)
        self._watch.results(live, batch)
        self._device = next(tensor.device for _, tensor in live.named())
        for row, index in enumerate(missing):
            self._cache.put(keys[index], live.rows(row, row + 1))
        if len(missing) == len(batch):
            return live
        rows = {index: live.rows(row, row + 1) for row, index in enumerate(missing)}
        self._upload = self._upload_to(self._device)
        return _join([rows[i] if part is None else self._upload.features(part) for i, part in enumerate(found)])

    def statistics(self) -> CacheStatistics:
        """A snapshot: hits, misses, drops, MB/s, size."""
        return self._cache.statistics()

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until all that was computed is written; False if that takes longer than ``timeout`` seconds."""
        return self._cache.flush(timeout)

    def close(self, timeout: float = 60.0) -> None:
        """Write what is queued. The cache still answers afterwards, but takes nothing in. May be called twice."""
        self._cache.close(timeout)

    def __enter__(self) -> CachedTeacher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_finalizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._finalizer = weakref.finalize(self, FeatureCache.close, self._cache, 10.0)

    def __repr__(self) -> str:
        return f"CachedTeacher({self.teacher!r}, {self._cache!r})"

    def _result_device(self, batch: ImageBatch) -> torch.device:
        """Where the teacher gives its results: as it last did, as it says, or where the images are."""
        if self._device is not None:
            return self._device
        return as_device(getattr(self.teacher, "device", None) or batch.tensors[0].device)

    def _upload_to(self, device: torch.device) -> Upload:
        return self._upload if self._upload.device == device else Upload(device)

    def _keys(
        self, batch: ImageBatch, spec: FeatureSpec, fingerprint: str | None, known: list[bytes] | None = None
    ) -> list[bytes]:
        """One key per image: the view's digest, then a digest of the teacher and of what it is asked for.

        ``known`` are keys of the same images, whose digests need not be computed again.
        """
        asked = json.dumps([fingerprint, computed_in(self.teacher), asdict(spec)], sort_keys=True).encode()
        tail = view_digest(np.frombuffer(asked, np.uint8))
        if known is not None:
            return [key[: -len(tail)] + tail for key in known]
        return [_digest(image) + tail for image in batch]


def _digest(image: Tensor) -> bytes:
    """Of an image's pixels, dtype and shape; NumPy has no bfloat16, whose bits therefore go under its name."""
    if image.dtype == torch.bfloat16:
        return b"bf16" + view_digest(image.contiguous().view(torch.int16).cpu().numpy())
    return view_digest(image.cpu().numpy())


def _take(batch: ImageBatch, indices: list[int]) -> Tensor | list[Tensor]:
    if batch.stacked is not None:
        return batch.stacked[indices]
    return [batch.ragged[index] for index in indices]


def _join(parts: list[Features]) -> Features:
    """Features of single images as one batch, in order."""
    shapes = {tuple((name, tensor.shape) for name, tensor in part.named()) for part in parts}
    if len(shapes) > 1:
        raise InputError(f"images of one batch must give outputs of one shape; got {sorted(map(str, shapes))}")
    return Features.cat(parts)
