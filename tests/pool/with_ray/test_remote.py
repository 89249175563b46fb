"""Remote and local-mode results against the local teacher, bit for bit, on real photographs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec, TeacherPool
from dinov3_ray.config.preprocessing import ViewSize

EVERYTHING = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(0, 2))
MAX_BATCH = 4


@pytest.mark.parametrize(
    ("local_mode", "dtype", "image_size"),
    [
        *itertools.product([True], ["float32", "bfloat16"], [224, 518, (160, 304), "input", "input/2"]),
        # A replica of the real model takes seconds to start; these two differ in all that the wire carries.
        (False, "float32", 224),
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
    local = DinoV3Teacher(config, "cpu")
    batches = [photographs]
    if isinstance(image_size, str):  # the images of a batch have one size, and each batch has another
        batches = [[photograph] for photograph in photographs] + [[photographs[0], photographs[5]]]
    # The pool cuts at max_batch; the local teacher is given the same batch shapes.
    parts = [batch[start : start + MAX_BATCH] for batch in batches for start in range(0, len(batch), MAX_BATCH)]
    expected = [local.extract(part, EVERYTHING) for part in parts]
    # Two replicas share the parts of a batch; each takes seconds to start, and once is enough to see that.
    replicas = 2 if local_mode or (image_size, dtype) == (224, "float32") else 1
    with TeacherPool.start(config, name="bits", replicas=replicas, max_batch=MAX_BATCH, local_mode=local_mode) as pool:
        handles = [pool.teacher().submit(batch, EVERYTHING) for batch in batches]
        found = [handle.result() for handle in handles]
    assert [len(features) for features in found] == [len(batch) for batch in batches]
    rows = iter(expected)
    for features in found:
        theirs = [next(rows) for _ in range(0, len(features), MAX_BATCH)]
        for name, tensor in features.named():
            wanted = torch.cat([dict(part.named())[name] for part in theirs])
            assert tensor.dtype == wanted.dtype
            assert torch.equal(tensor, wanted), name
