"""The stopwatch: what it tells, when, and that it can be copied."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import torch

from dinov3_ray import DinoV3Teacher, FeatureSpec
from dinov3_ray.model.device import Stopwatch


def test_it_tells_the_last_stretch() -> None:
    stopwatch = Stopwatch()
    assert stopwatch.seconds == 0.0
    begun = time.perf_counter()
    with stopwatch.measure(torch.device("cpu")):
        torch.rand(1000, 1000).sum()
    elapsed = time.perf_counter() - begun
    assert 0 < stopwatch.seconds <= elapsed
    assert copy.deepcopy(stopwatch).seconds == 0.0


def test_the_local_teacher_tells_its_preprocessing(tiny_checkpoint: Path) -> None:
    teacher = DinoV3Teacher(tiny_checkpoint)
    assert teacher.preprocess_seconds == 0.0
    begun = time.perf_counter()
    teacher.extract(torch.rand(2, 3, 300, 400), FeatureSpec(cls=True))
    assert 0 < teacher.preprocess_seconds < time.perf_counter() - begun
    assert copy.deepcopy(teacher).preprocess_seconds == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_measures_the_device_and_waits_for_nothing(tiny_checkpoint: Path) -> None:
    device = torch.device("cuda:0")
    matrix = torch.rand(8192, 8192, device=device)
    torch.cuda.synchronize()
    stopwatch = Stopwatch()
    begun = time.perf_counter()
    with stopwatch.measure(device):
        for _ in range(20):
            matrix @ matrix
    assert stopwatch.seconds == 0.0, "told before the device had finished"
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - begun
    assert elapsed / 2 < stopwatch.seconds <= elapsed

    teacher = DinoV3Teacher(tiny_checkpoint, device)
    features = teacher.extract(torch.rand(2, 3, 300, 400), FeatureSpec(cls=True))
    features.to("cpu")
    assert teacher.preprocess_seconds > 0
    assert copy.deepcopy(teacher).preprocess_seconds == 0.0
