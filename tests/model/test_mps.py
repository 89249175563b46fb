"""What Apple's GPUs (MPS) need, decided by code that runs without one. No test here has run on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_ray import DinoV3Config, DinoV3Teacher, TeacherPool
from dinov3_ray.errors import ConfigError
from dinov3_ray.features import resample_map
from dinov3_ray.images import ImageBatch
from dinov3_ray.model import preprocess as preprocess_module
from dinov3_ray.model.device import Stopwatch, as_device, choose_dtype, computing_on, empty_cache
from dinov3_ray.model.preprocess import preprocess
from dinov3_ray.model.upload import Upload
from dinov3_ray.pool import teacher_pool

MPS = torch.device("mps")


class Elsewhere:
    """A CPU tensor that says that it is on MPS, and notes what it was asked to move to."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.moves = tensor, []  # type: tuple[Tensor, list[Any]]
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, torch.device("mps:0")

    def cpu(self) -> Tensor:
        return self.tensor


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_a_device_that_is_not_there_is_refused(tiny_checkpoint: Path) -> None:
    for name in ("mps", "xpu"):
        with pytest.raises(
            ConfigError, match=rf"device must be one that this process has; got '{name}', and torch"
        ) as caught:
            as_device(name)
        assert len(str(caught.value)) < 150  # not torch's own text, which is of its builds
    with pytest.raises(ConfigError, match=r"got 'mps'"):
        DinoV3Teacher(tiny_checkpoint, "mps")


def test_a_device_has_the_name_that_its_tensors_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, device: Elsewhere(torch.zeros(0)))
    assert as_device("mps") == torch.device("mps:0")


def test_it_computes_in_float32_unless_asked(tiny_checkpoint: Path) -> None:
    assert choose_dtype("auto", MPS) == (torch.float32, "mps is not known to multiply bfloat16 in hardware")
    assert choose_dtype("float16", MPS)[0] == torch.float16
    with pytest.raises(ConfigError, match=r"dtype must be another than 'float8' on mps"):
        choose_dtype("float8", MPS)
    assert DinoV3Config(tiny_checkpoint).compile_mode("mps") is None


def test_nothing_of_cuda_is_touched() -> None:
    batch = ImageBatch.of(torch.zeros(1, 3, 32, 32))
    assert Upload(MPS)(batch) is batch
    watch = Stopwatch()
    with computing_on(MPS), watch.measure(MPS):
        pass
    assert watch.seconds > 0
    with torch.autocast("mps", enabled=False, cache_enabled=True):  # as a forward pass has it
        pass
    assert not torch.cuda.is_initialized()


def test_images_are_resized_on_the_cpu_and_sent(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch before 2.8 has no antialiased resize there.
    rule = DinoV3Config(tiny_checkpoint).preprocessing
    images = ImageBatch.of(torch.rand(2, 3, 40, 50, dtype=torch.float64))  # a dtype that MPS does not have
    expected = preprocess(images, rule, torch.device("cpu"))
    sent: list[tuple[Tensor, torch.device]] = []

    def to(self: Tensor, device: torch.device) -> Tensor:
        if device.type == "mps":
            sent.append((self, device))
        return self

    monkeypatch.setattr(Tensor, "to", to)
    preprocess_module.preprocess(images, rule, MPS)
    ((pixels, device),) = sent
    assert device == MPS
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, expected)


def test_maps_are_pooled_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # There, torch pools only where the sizes divide.
    map_BDhw = torch.rand(1, 2, 7, 9)
    moved: list[torch.device] = []
    expected, to = resample_map(map_BDhw, (3, 4)), Tensor.to

    def note(self: Tensor, place: Any) -> Tensor:
        if isinstance(place, torch.device) and place.type == "mps":
            moved.append(place)
            return self
        return to(self, place)

    monkeypatch.setattr(Tensor, "to", note)
    assert torch.equal(resample_map(Elsewhere(map_BDhw), (3, 4)), expected)  # type: ignore[arg-type]
    assert moved == [torch.device("mps:0")]
    assert torch.equal(expected, F.interpolate(map_BDhw, (3, 4), mode="area"))


def test_a_shortage_gives_its_cache_back(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append("mps"))
    empty_cache()
    assert emptied == ["mps"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA goes first")
def test_a_local_pool_computes_there_unless_told_otherwise(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    def controller(name: str, spec: object, device: str) -> object:
        devices.append(device)
        raise RuntimeError("enough")

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(teacher_pool, "LocalController", controller)
    for options in ({}, {"num_gpus": 1}, {"num_gpus": 0}):
        with pytest.raises(RuntimeError, match="enough"):
            TeacherPool.start(DinoV3Config(tiny_checkpoint), local_mode=True, **options)
    assert devices == ["mps:0", "mps:0", "cpu"]
