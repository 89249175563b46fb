"""A replica hosted in this process: the same checks and results as in a pool, with one pass at a time or several."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from sample_images import images_of

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec
from dinov3_ray.errors import InputError, NumericsError
from dinov3_ray.pool.replica.device_pipeline import ConcurrentPipeline, pipeline_for
from dinov3_ray.pool.replica.hosted import HostedReplica
from dinov3_ray.testing import FakeTeacher

SPEC = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(-2,))
PIPELINES = [pipeline_for, partial(ConcurrentPipeline, passes=3, threads=1)]


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_results_are_the_local_teachers_in_the_order_of_submission(tiny_checkpoint: Path, pipeline: object) -> None:
    config = DinoV3Config(tiny_checkpoint)
    local = DinoV3Teacher(config)
    hosted = HostedReplica(lambda: DinoV3Teacher(config), max_batch=2, threads=1, pipeline=pipeline)  # type: ignore[arg-type]
    submitted = [hosted.submit(images_of(number), SPEC) for number in range(12)]
    for number, future in enumerate(submitted):
        features, expected = future.result(30), local.extract(images_of(number), SPEC)
        assert features.fingerprint == expected.fingerprint == hosted.fingerprint
        for (name, tensor), (_, wanted) in zip(features.named(), expected.named(), strict=True):
            assert torch.equal(tensor, wanted), name
    assert hosted.preprocessing == config.preprocessing
    assert hosted.patch_size == config.patch_size
    assert hosted.info.golden_cosine is not None
    assert hosted.info.golden_cosine > 0.999
    hosted.close()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_bad_batch_fails_alone(pipeline: object) -> None:
    hosted = HostedReplica(FakeTeacher, max_batch=2, pipeline=pipeline)  # type: ignore[arg-type]
    good = hosted.submit(images_of(0), SPEC)
    bad = hosted.submit(torch.full((1, 3, 48, 64), float("nan")), SPEC)
    small = hosted.submit(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), SPEC)
    again = hosted.submit(images_of(0), SPEC)
    with pytest.raises(InputError, match="images must be finite"):
        bad.result(30)
    with pytest.raises(InputError) as refused:
        small.result(30)
    assert "Traceback" in "".join(refused.value.__notes__)  # where in the teacher it was raised
    assert torch.equal(good.result(30).cls, again.result(30).cls)  # type: ignore[arg-type]
    hosted.close()


class Infinite(FakeTeacher):
    def extract(self, images, spec):  # type: ignore[no-untyped-def]
        return super().extract(images, spec).map(lambda _, tensor: tensor / 0)


def test_results_that_are_not_finite_are_an_error_of_the_teacher() -> None:
    hosted = HostedReplica(Infinite, max_batch=2)
    with pytest.raises(NumericsError, match="has values that are not finite"):
        hosted.submit(images_of(0), SPEC).result(30)
    hosted.close()


def test_a_teacher_that_cannot_be_built_says_why() -> None:
    def broken() -> FakeTeacher:
        raise LookupError("no weights")

    with pytest.raises(LookupError, match="no weights"):
        HostedReplica(broken, max_batch=2)
