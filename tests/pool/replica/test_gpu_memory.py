"""How torch takes the memory of a GPU where replicas are started, and how much of one that they share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dinov3_ray.errors import ConfigError
from dinov3_ray.pool.replica import gpu_memory
from dinov3_ray.pool.replica.gpu_memory import expand_segments, within_share
from dinov3_ray.teacher import Extractor
from dinov3_ray.testing import FakeTeacher

NEW, OLD = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
GIB = 2**30


@pytest.mark.parametrize(
    ("version", "given", "expected"),
    [
        ("2.13.0+cu130", {}, {NEW: "expandable_segments:True"}),
        ("2.9.0", {}, {NEW: "expandable_segments:True"}),
        ("2.8.1", {}, {OLD: "expandable_segments:True"}),
        ("2.10.0a0", {OLD: "max_split_size_mb:64,"}, {OLD: "max_split_size_mb:64,expandable_segments:True"}),
        ("2.6.0", {NEW: "backend:native"}, {NEW: "backend:native,expandable_segments:True"}),
        (
            "2.13.0",
            {NEW: "a:1", OLD: "b:2"},
            {NEW: "a:1,expandable_segments:True", OLD: "b:2,expandable_segments:True"},
        ),
        ("2.13.0", {NEW: " "}, {NEW: "expandable_segments:True"}),
        ("2.13.0", {OLD: "expandable_segments:False"}, {OLD: "expandable_segments:False"}),
        ("2.13.0", {OLD: "expandable_segments:False", NEW: "a:1"}, {OLD: "expandable_segments:False", NEW: "a:1"}),
        ("2.13.0", {OLD: "backend:cudaMallocAsync"}, {OLD: "backend:cudaMallocAsync"}),
    ],
)
def test_segments_expand_unless_the_user_says_otherwise(
    version: str, given: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_memory, "version", lambda name: version)
    monkeypatch.setattr(gpu_memory.platform, "release", lambda: "6.8.0-generic")
    for num_gpus, wanted in ((1.0, expected), (0.5, expected), (0.0, given), (None, given)):
        environment = dict(given)
        expand_segments(num_gpus, environment)
        assert environment == wanted, num_gpus
    monkeypatch.setattr(gpu_memory.platform, "release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    environment = dict(given)
    expand_segments(1.0, environment)
    assert environment == given, "its first allocation would fail in WSL"


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int] | str]:
    """What happens in a process with a GPU of 16 GiB: the bounds that are set, and the building."""
    seen: list[tuple[float, int] | str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=16 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *bound: seen.append(bound))
    return seen


@pytest.mark.parametrize("num_gpus", [0.25, 0.5, 0.9])
def test_replicas_of_one_gpu_and_cuda_fit_it_together(num_gpus: float, bounds: list[tuple[float, int] | str]) -> None:
    def build() -> Extractor:
        bounds.append("built")
        return FakeTeacher()

    assert isinstance(within_share(build, num_gpus)(), FakeTeacher)
    (bound, device), built = bounds
    assert (device, built) == (0, "built"), "bounded before it takes memory"
    assert float(bound) * 16 * GIB + GIB / 2 == num_gpus * 16 * GIB


@pytest.mark.parametrize("num_gpus", [0.0, None, 1.0])
def test_whole_gpus_and_cpus_have_no_bound(num_gpus: float | None, bounds: list[tuple[float, int] | str]) -> None:
    within_share(FakeTeacher, num_gpus)()
    assert bounds == []


def test_a_share_that_holds_no_more_than_cuda_itself_is_refused(bounds: list[tuple[float, int] | str]) -> None:
    with pytest.raises(
        ConfigError, match=r"num_gpus must be more than 0\.031 on a GPU of 16\.0 GiB, .*; got 0\.01 \(give"
    ):
        within_share(FakeTeacher, 0.01)()
    assert bounds == []
