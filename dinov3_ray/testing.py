"""A teacher for tests: no weights, no device, results that depend on every image.

Public, so that users test their own training code with it::

    with TeacherPool.start(FakeTeacher.factory(), replicas=2, local_mode=True) as pool:
        features = pool.teacher().extract_features(images)
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from dinov3_ray.errors import InputError, SpecError
from dinov3_ray.features import Features, FeatureSpec, deliver, resample_map
from dinov3_ray.images import ImageBatch, Images
from dinov3_ray.teacher import TeacherMixin
from dinov3_ray.watch import TeacherWatch

__all__ = ["FakeTeacher"]


class FakeTeacher(TeacherMixin[Images]):
    """Has the local teacher's methods, shapes and checks. An image's features depend on that image's pixels only.

    A feature is a fixed function of the image's mean colours on the patch grid. Equal images therefore give equal bits
    in any batch, a test notices swapped results, and the map is a picture of the image.

    Args:
        hidden_size: D.
        patch_size: pixels per patch; the grid is (H // patch_size, W // patch_size).
        num_register_tokens: R.
        depth: blocks that ``FeatureSpec.layers`` may name.
        image_size: (H, W) that images are resized to; None keeps each batch's own size (then a batch must have one).
        dtype: the compute dtype.
        delay: seconds that each forward pass sleeps.
        delay_per_image: seconds that each forward pass sleeps per image, added to ``delay``.
        fail_on: numbers of the calls, from 0, that raise ``error``.
        error: what those calls raise.
        fingerprint: the results' fingerprint.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 16,
        patch_size: int = 16,
        num_register_tokens: int = 4,
        depth: int = 4,
        image_size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        delay: float = 0.0,
        delay_per_image: float = 0.0,
        fail_on: Collection[int] = (),
        error: Exception | None = None,
        fingerprint: str = "fake",
    ) -> None:
        self.hidden_size = hidden_size
        self.patch_size = patch_size
        self.num_register_tokens = num_register_tokens
        self.depth = depth
        self.image_size = image_size
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.fingerprint = fingerprint
        self.calls = 0
        self._delay, self._delay_per_image = delay, delay_per_image
        self._fail_on = frozenset(fail_on)
        self._error = error or RuntimeError("scripted failure of a FakeTeacher")
        self._lock = threading.Lock()
        self._watch = TeacherWatch()
        # Fixed irrational steps: every channel mixes the colours in its own way.
        self._mix_3D = torch.sin(torch.arange(1, 3 * hidden_size + 1, dtype=torch.float32)).view(3, hidden_size)

    @classmethod
    def factory(cls, **arguments: object) -> Callable[[], FakeTeacher]:
        """A picklable factory for ``TeacherPool.start``."""
        return functools.partial(cls, **arguments)  # type: ignore[arg-type]

    @property
    def grid_size(self) -> tuple[int, int] | None:
        if self.image_size is None:
            return None
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        """All outputs that ``spec`` asks for.

        Raises:
            InputError, SpecError, NumericsError: as the local teacher does.
            Exception: the scripted one.
        """
        batch = ImageBatch.of(images, min_side=self.patch_size)
        spec.require_outputs()
        blocks = spec.blocks(self.depth)
        if spec.registers and not self.num_register_tokens:
            raise SpecError("FeatureSpec.registers: this teacher has no register tokens")
        if self.image_size is None and len({image.shape for image in batch}) > 1:
            raise InputError("images must have one size where the teacher has none: set image_size=(H, W)")
        self._watch.images(batch)
        with self._lock:
            call, self.calls = self.calls, self.calls + 1
        time.sleep(self._delay + self._delay_per_image * len(batch))
        if call in self._fail_on:
            raise self._error
        # Results are ordinary tensors in any mode of the caller, as the local teacher's are.
        with torch.inference_mode(False), torch.no_grad():
            features = deliver(self._compute(batch, spec, blocks), spec)
        self._watch.results(features, batch)
        return features

    def _compute(self, batch: ImageBatch, spec: FeatureSpec, blocks: tuple[int, ...]) -> Features:
        map_BDhw = torch.cat([self._map(image) for image in batch])
        cls_BD = map_BDhw.double().mean(dim=(2, 3)).float()
        named: dict[str, Tensor] = {}
        if spec.cls:
            named["cls"] = cls_BD
        if spec.feature_map:
            named["feature_map"] = map_BDhw
        if spec.registers:
            named["registers"] = torch.stack([cls_BD * (r + 2) for r in range(self.num_register_tokens)], dim=1)
        for index, block in zip(spec.layers, blocks, strict=True):
            scale = 1.0 if spec.norm else 2.0
            named[f"layers.{index}"] = map_BDhw * scale * (block + 1)
        return Features.from_named(named, self.fingerprint).map(lambda name, t: self._finish(name, t, spec))

    def eval(self) -> FakeTeacher:
        """Itself."""
        return self

    def _map(self, image_3HW: Tensor) -> Tensor:
        scaled = image_3HW.float() / 255 if image_3HW.dtype == torch.uint8 else image_3HW.float()
        if self.image_size is not None:
            scaled = resample_map(scaled[None], self.image_size)[0]
        size = self.patch_size
        height, width = scaled.shape[1] // size, scaled.shape[2] // size
        patches = scaled[:, : height * size, : width * size].reshape(3, height, size, width, size)
        # float64 means, and products added one by one: unlike those of a matrix product, their bits do not depend on
        # threads or on the alignment of memory.
        red, green, blue = patches.double().mean(dim=(2, 4)).float()
        mix_D = self._mix_3D[:, :, None, None]
        map_Dhw: Tensor = red * mix_D[0] + green * mix_D[1] + blue * mix_D[2]
        return map_Dhw[None]

    def _finish(self, name: str, tensor: Tensor, spec: FeatureSpec) -> Tensor:
        if spec.map_size is not None and (name == "feature_map" or name.startswith("layers.")):
            tensor = resample_map(tensor, spec.map_size)
        return tensor.to(self.dtype).contiguous()
