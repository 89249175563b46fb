"""Teachers that an extraction must not take for what they are not."""

from __future__ import annotations

import os
import signal

import torch
from torch import Tensor

from dinov3_ray.config.preprocessing import Preprocessing
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
    """Gives the number of images in the batch for each of them; it takes images of different sizes together."""

    preprocessing = Preprocessing((32, 32), None, None, 1 / 255, (0, 0, 0), (1, 1, 1), (32, 32))

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        black = torch.zeros(len(images), 3, 32, 32, dtype=torch.uint8)
        return super().extract(black, spec).map(lambda _, tensor: tensor * 0 + len(tensor))


class Greedy(FakeTeacher):
    """Ends its process at a batch of several images, as the kernel does to one that takes too much memory."""

    preprocessing = Sized.preprocessing

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        if len(images) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().extract(images, spec)


class Broken:
    fingerprint = "broken"

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        return FakeTeacher().extract(images, spec).map(lambda _, tensor: tensor / 0)


class Nameless:
    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        return Features({**FakeTeacher().extract(images, spec)})
