"""Stored and cached features on fake GPUs: the student does not wait for them, nor a cache too little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda
from planted import planted
from stores import SPEC, build, ids
from torch import Tensor

from dinov3_ray import Features, FeatureSpec
from dinov3_ray.datasets import CachedTeacher, FeatureStore, StoredTeacher, cache_db
from dinov3_ray.datasets.cache_db import _Queued
from dinov3_ray.images import Images
from dinov3_ray.model.upload import Upload
from dinov3_ray.testing import FakeTeacher

ONE = torch.device("cuda:1")


@pytest.fixture
def cuda(cuda: FakeCuda) -> FakeCuda:
    torch.cuda.set_device(1)
    torch.cuda.set_stream(torch.cuda.Stream())  # the student's
    return cuda


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    folder = tmp_path_factory.mktemp("stored")
    build(folder, SPEC, FakeTeacher())
    return FeatureStore(folder)


def read(store: FeatureStore, cuda: FakeCuda) -> list[str]:
    """What is wrong with two batches of stored features that a student reads."""
    teacher = StoredTeacher(store, device="cuda")
    assert teacher.device == ONE
    for start in (0, 4):
        features = teacher.extract(ids()[start : start + 4], SPEC)
        assert all((tensor * 2).device == ONE for _, tensor in features.named())
    return cuda.found()


def test_stored_features_reach_the_student_without_a_wait(store: FeatureStore, cuda: FakeCuda) -> None:
    assert (read(store, cuda), cuda.contexts, cuda.astray) == ([], {1}, [])
    with planted(Upload.features, 'self.device.type != "cuda"', "True"):
        assert any(fault.startswith("wait: ") for fault in read(store, cuda))


class OnTheStudentsStream:
    """A local teacher, whose results are in the stream of its caller."""

    device = ONE
    fingerprint = "of a test"

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        assert isinstance(images, Tensor)
        images = images.pin_memory().to(ONE, non_blocking=True)
        return Features(cls=images.float().mean(dim=(2, 3)), fingerprint=self.fingerprint)


@pytest.mark.parametrize("waits", [True, False])
def test_a_cache_reads_results_when_they_are_computed(
    tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    written: list[torch.device] = []
    monkeypatch.setattr(cache_db, "pack", lambda features: written.append(features.cls.device) or b"features")
    fault = planted(_Queued.on_host, "pending.receive()", "None" if not waits else "pending.receive()")
    with fault, CachedTeacher(OnTheStudentsStream(), tmp_path, max_bytes=2**24) as teacher:
        teacher.extract(torch.full((3, 3, 32, 32), 100, dtype=torch.uint8), FeatureSpec(cls=True))
        assert teacher.flush()
    assert written == [torch.device("cpu")] * 3
    races = [fault for fault in cuda.found() if fault.startswith("race: ")]
    assert bool(races) is not waits
    assert cuda.contexts == {1}
    assert not [wait for wait in cuda.watch.waits if wait.thread != "feature-cache"]
