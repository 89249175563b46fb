"""A pool's teacher: the contract of every teacher, and results equal to the local one's bit for bit, on photographs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from teacher_contract import TeacherContract
from torch import Tensor

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec, RemoteTeacher, TeacherPool
from dinov3_ray.config.preprocessing import ViewSize

EVERYTHING = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(0, 2))
MAX_BATCH = 4


@pytest.mark.parametrize(
    ("local_mode", "dtype", "image_size"),
    [
        *itertools.product([True], ["float32", "bfloat16"], [224, 518, (160, 304), "input", "input/2"]),
        # A replica of the real model takes seconds to start; this and the pool of the contract's tests differ in all
        # that the wire carries.
        (False, "bfloat16", "input"),
    ],
)
def test_equal_bit_for_bit_on_photographs(
    tiny_checkpoint: Path,
    photographs: list[Tensor],
    ray_cluster: str,
    local_mode: bool,
    dtype: str,
    image_size: int | tuple[int, int] | ViewSize,
) -> None:
    config = DinoV3Config(tiny_checkpoint, dtype=dtype, image_size=image_size)  # type: ignore[arg-type]
    batches = [photographs]
    if isinstance(image_size, str):  # the images of a batch have one size, and each batch has another
        batches = [[photograph] for photograph in photographs] + [[photographs[0], photographs[5]]]
    replicas = 2 if local_mode else 1
    with TeacherPool.start(config, name="bits", replicas=replicas, max_batch=MAX_BATCH, local_mode=local_mode) as pool:
        check_equal(pool.teacher(), DinoV3Teacher(config, "cpu"), batches)


def check_equal(remote: RemoteTeacher, local: DinoV3Teacher, batches: list[list[Tensor]]) -> None:
    handles = [remote.submit(batch, EVERYTHING) for batch in batches]
    for handle, batch in zip(handles, batches, strict=True):
        # The pool cuts at max_batch; the local teacher is given the same batch shapes.
        parts = [batch[start : start + MAX_BATCH] for start in range(0, len(batch), MAX_BATCH)]
        expected = [dict(local.extract(part, EVERYTHING).named()) for part in parts]
        features = handle.result()
        assert len(features) == len(batch)
        for name, tensor in features.named():
            wanted = torch.cat([part[name] for part in expected])
            assert tensor.dtype == wanted.dtype
            assert torch.equal(tensor, wanted), name


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Path, ray_cluster: str) -> Iterator[RemoteTeacher]:
    """Of a pool of two replicas, which share the parts of a batch."""
    config = DinoV3Config(tiny_checkpoint, dtype="float32")
    with TeacherPool.start(config, name="contract", replicas=2, max_batch=MAX_BATCH) as pool:
        yield pool.teacher()


def test_two_replicas_of_a_cluster_are_equal_too(
    teacher: RemoteTeacher, tiny_checkpoint: Path, photographs: list[Tensor]
) -> None:
    check_equal(teacher, DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32")), [photographs])


class TestContract(TeacherContract):
    pass
