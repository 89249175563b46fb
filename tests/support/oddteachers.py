"""Teachers that an extraction must not take for what they are not."""

from __future__ import annotations

from torch import Tensor

from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import Images
from dinov3_ray.testing import FakeTeacher


class Picky:
    """Refuses each image of fewer than 50 rows, and counts on."""

    fingerprint = "picky"

    def extract(self, images: Tensor, spec: FeatureSpec) -> Features:
        return FakeTeacher(patch_size=50).extract(images, spec)


class Changing(FakeTeacher):
    """Becomes another teacher after two passes, as a pool does that is reloaded."""

    def __init__(self) -> None:
        super().__init__()
        self._passes = 0

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        self._passes += 1
        self.fingerprint = "before" if self._passes <= 2 else "after"
        return super().extract(images, spec)


class Sized(FakeTeacher):
    """Gives the number of images in the batch for each of them."""

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        return super().extract(images, spec).map(lambda _, tensor: tensor * 0 + len(tensor))


class Broken:
    fingerprint = "broken"

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        return FakeTeacher().extract(images, spec).map(lambda _, tensor: tensor / 0)


class Nameless:
    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        return Features({**FakeTeacher().extract(images, spec)})
