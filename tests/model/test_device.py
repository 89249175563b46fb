"""A teacher's device: its index, its dtype, its thread; and the stopwatch, which says how long it took."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec
from dinov3_ray.errors import ConfigError
from dinov3_ray.model.device import Stopwatch, as_device, choose_dtype, settle_thread


def test_cuda_gets_the_index_of_the_callers_current_device() -> None:
    with FakeCuda(devices=2):
        assert as_device("cuda") == torch.device("cuda:0")
        torch.cuda.set_device(1)
        assert as_device("cuda") == as_device(torch.device("cuda")) == as_device("cuda:1") == torch.device("cuda:1")
        assert as_device("cuda:0") == torch.device("cuda:0")
        with pytest.raises(ConfigError, match="'cuda:2', and it sees 2"):
            as_device("cuda:2")
    assert as_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")], ids=str)
def test_a_thread_is_settled_on_cuda_devices_only(device: object) -> None:
    settle_thread(device)  # there is no CUDA here to ask


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "name", "dtype"),
    [
        ((9, 0), "NVIDIA H100", torch.bfloat16),
        ((7, 5), "Tesla T4", torch.float32),
    ],
)
def test_auto_says_why_and_what_a_gpu_without_bfloat16_could_do(
    tiny_checkpoint: Path,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    name: str,
    dtype: torch.dtype,
) -> None:
    caplog.set_level("WARNING", logger="dinov3_ray")
    with FakeCuda(capability=capability, name=name):
        assert choose_dtype("auto", torch.device("cuda:0"))[0] == dtype
        assert DinoV3Teacher(tiny_checkpoint, "cuda:0").dtype == dtype
        assert DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float16"), "cuda:0").dtype == torch.float16
    (record,) = caplog.records
    said = record.getMessage()
    assert name in said
    offered = all(words in said for words in ("dtype='float16'", "overflow", "golden check", "teacher.prove()"))
    assert offered is (dtype == torch.float32)


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
