"""Replicas compile by the rule of local teachers, so that results stay equal bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compile_backend import Backend, compile_on_cpus

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec, TeacherPool
from dinov3_ray.errors import PoolError

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
CLS = FeatureSpec(cls=True)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    compile_on_cpus(monkeypatch)
    return Backend.in_place_of_inductor(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("fails_at", [10**6, 2])
def test_a_replica_is_compiled_as_a_local_teacher_is(tiny_checkpoint: Path, backend: Backend, fails_at: int) -> None:
    backend.fails_at = fails_at
    config = DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64)
    with TeacherPool.start(config, name="compiled", local_mode=True) as pool, pool.teacher() as remote:
        before = backend.graphs
        found = [remote.extract(IMAGES[:rows], CLS).cls for rows in (3, 1)]
        assert backend.graphs == before, "all of it was compiled before the replica was ready"
        compiled = remote.info.compiled
    local = DinoV3Teacher(config)
    assert compiled == local.compiled == (fails_at > 2)
    for rows, cls in zip((3, 1), found, strict=True):
        assert torch.equal(cls, local.extract(IMAGES[:rows], CLS).cls)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_pool_that_must_compile_and_cannot_does_not_start(tiny_checkpoint: Path, backend: Backend) -> None:
    backend.fails_at = 1
    config = DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64, compile=True)
    with pytest.raises(PoolError, match="Failed to find C compiler"):
        TeacherPool.start(config, name="compiled", local_mode=True)
