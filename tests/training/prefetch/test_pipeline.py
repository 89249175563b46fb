"""Targets on their way to a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov3_ray import Features, FeatureSpec
from dinov3_ray.images import Images
from dinov3_ray.teacher import Extractor
from dinov3_ray.training.prefetch import prefetch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("where", ["cpu", "cuda"], ids=["teacher-on-cpu", "teacher-on-cuda"])
def test_targets_reach_the_gpu_before_they_are_used(where: str) -> None:
    class Doubler:
        device = torch.device(where)

        def extract(self, images: Images, spec: FeatureSpec) -> Features:
            assert isinstance(images, Tensor)
            return Features(feature_map=images.to(where).float() * 2)

    loader = [torch.full((4, 3, 512, 512), number, dtype=torch.uint8) for number in range(40)]
    teacher: Extractor = Doubler()
    with torch.cuda.stream(torch.cuda.Stream()):
        for number, (_, targets) in enumerate(prefetch(teacher, loader, FeatureSpec(feature_map=True), device="cuda")):
            assert targets.feature_map is not None
            assert targets.feature_map.is_cuda
            torch.cuda._sleep(10_000_000)  # kernels behind which a memory block given back too soon would be reused
            total = (targets.feature_map - 2 * number).abs().sum()
            del targets
            assert total.item() == 0
