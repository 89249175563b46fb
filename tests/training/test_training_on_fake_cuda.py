"""Targets on their way to the trainer's fake GPU: ordered, without a wait, and through threads that stay on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from planted import planted
from torch import Tensor

from dinov3_ray import DinoV3Config, DinoV3Teacher, Features, FeatureSpec
from dinov3_ray.images import Images
from dinov3_ray.model.upload import Pending, Upload, _staged
from dinov3_ray.training.prefetch import prefetch
from dinov3_ray.training.prefetch.pipeline import Delivery, LocalSource, Pipeline

SPEC = FeatureSpec(cls=True, feature_map=True)
LOADER = [torch.full((4, 3, 64, 64), 100, dtype=torch.uint8) for _ in range(5)]


class OnTheCpu:
    """A teacher whose results are on the CPU, as a pool's are."""

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        assert isinstance(images, Tensor)
        return Features(cls=images.float().mean(dim=(2, 3)), feature_map=images.float())


class OnTheCurrentDevice:
    """A teacher of the user's, which computes where torch's ``cuda`` is, and does not say where."""

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        assert isinstance(images, Tensor)
        images = images.pin_memory().to("cuda", non_blocking=True)
        return Features(cls=images.float().mean(dim=(2, 3)), feature_map=images.float())


def train(cuda: FakeCuda, teacher: Any, device: str | None, current: int = 1) -> None:
    """A student on the second GPU that reads its targets in its own stream, and drops them at once."""
    with torch.cuda.device(current), torch.cuda.stream(torch.cuda.Stream("cuda:1")):
        torch.cuda.set_device(current)
        weight = torch.zeros(3, device="cuda:1")
        for _, targets in prefetch(teacher, LOADER, SPEC, device=device):
            weight.add_((targets.feature_map.mean() + targets.cls.mean()).sum())
            del targets
    assert len(cuda.watch.launches) > len(LOADER)


@pytest.mark.parametrize(("device", "current"), [("cuda:1", 1), ("cuda", 1), ("cuda:1", 0)])
def test_targets_reach_the_students_gpu_and_nothing_waits(cuda: FakeCuda, device: str, current: int) -> None:
    train(cuda, OnTheCpu(), device, current)
    assert (cuda.found(), cuda.astray_in_our_threads(), cuda.contexts) == ([], [], {1, current})


def test_a_teacher_of_the_users_computes_on_its_callers_device(cuda: FakeCuda) -> None:
    train(cuda, OnTheCurrentDevice(), "cuda:1")
    assert (cuda.found(), cuda.astray_in_our_threads(), cuda.contexts) == ([], [], {1})


@pytest.mark.slow
@pytest.mark.parametrize(("where", "device"), [("cuda:1", "cuda"), ("cuda:1", None), ("cuda:0", "cuda:1")])
def test_a_local_teachers_targets_too(tiny_checkpoint: Path, cuda: FakeCuda, where: str, device: str | None) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="bfloat16", image_size=64), where)
    teacher.extract(LOADER[0], SPEC)
    torch.cuda.synchronize()  # transformers keeps RoPE's coordinates, for whatever stream comes next
    cuda.forget()
    train(cuda, teacher, device)
    assert cuda.found() == []
    assert cuda.contexts == {1, int(where[-1])}


FAULTS = {
    "no wait in the delivery": (Pending.receive, "stream.wait_event(self.ready)", "pass", "race"),
    "targets not kept": (Pending.receive, "tensor.record_stream(stream)", "pass", "freed"),
    "the copy blocks": (Upload.begin, ", non_blocking=True)", ")", "wait"),
    "targets are not pinned": (_staged, ", pin_memory=True", "", "unpinned"),
    "delivered as they are": (Delivery.receive, "pending.receive()", "pass", "race"),
    "another current device": (
        Upload.begin,
        "computing_on(self.device)",
        "computing_on(torch.device('cpu'))",
        "astray",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("function", "old", "new", "kind"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(cuda: FakeCuda, function: Any, old: str, new: str, kind: str) -> None:
    with planted(function, old, new):
        train(cuda, OnTheCpu(), "cuda:1", current=0)
    found = cuda.found() + [f"astray: {note}" for note in cuda.astray_in_our_threads()]
    assert any(fault.startswith(f"{kind}: ") for fault in found), found


def test_a_thread_that_is_not_settled_is_found(cuda: FakeCuda) -> None:
    with planted(Pipeline.__init__, "settle_thread, (_current_device(),)", "None"):
        train(cuda, OnTheCurrentDevice(), "cuda:1")
    assert cuda.contexts == {0, 1}


@pytest.mark.parametrize("current", [0, 1])
def test_a_teacher_on_cuda_is_on_its_callers_device(cuda: FakeCuda, current: int) -> None:
    teacher = OnTheCurrentDevice()
    teacher.device = torch.device("cuda")  # type: ignore[attr-defined]
    torch.cuda.set_device(current)
    assert LocalSource(teacher).shares(torch.device("cuda:1")) is (current == 1)
    assert LocalSource(teacher).shares(None)


def test_results_of_an_earlier_stream_are_waited_for(cuda: FakeCuda) -> None:
    delivery = Delivery(None)
    made, used = torch.cuda.Stream("cuda:1"), torch.cuda.Stream("cuda:1")
    for ordered in (True, False):
        cuda.forget()
        with torch.cuda.device(1), torch.cuda.stream(made):
            delivered = delivery.send({"": Features(cls=torch.zeros(3, 4, device="cuda:1"))})
        with torch.cuda.device(1), torch.cuda.stream(used):
            features = delivery.receive(delivered) if ordered else delivered.features
            features[""].cls.sum()
        assert bool(cuda.found()) is not ordered
