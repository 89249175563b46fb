"""What the tests share: real photographs, and a small checkpoint of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from skimage import data
from torch import Tensor

from dinov3_ray.checkpoint import init_checkpoint

# Those whose files stand in scikit-image's wheel: nothing is downloaded. Two are of one size, the rest of their own.
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "immunohistochemistry")


@pytest.fixture(scope="session")
def photographs() -> list[Tensor]:
    """Real photographs of mixed sizes: uint8 [3,H,W], RGB. Not to be changed in place."""
    return [torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).contiguous() for name in PHOTOGRAPHS]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory: a ViT of 3 blocks, D=128, 4 registers, patch 16, at 224 px; a pass takes milliseconds."""
    return init_checkpoint("vit-test", tmp_path_factory.mktemp("checkpoints") / "vit-test", seed=1)
