"""Some images through a temporary pool of one replica, there and back."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from dinov3_ray.doctor.finding import Finding, fine, problem
from dinov3_ray.errors import DinoV3Error
from dinov3_ray.features import FeatureSpec
from dinov3_ray.pool.spec import TeacherSource
from dinov3_ray.pool.teacher_pool import TeacherPool
from dinov3_ray.testing import FakeTeacher

__all__ = ["check_round_trip"]

_SUBJECT = "round trip"
_BATCH = 4
_SPEC = FeatureSpec(cls=True)


def check_round_trip(root: Path | None, *, in_cluster: bool, timeout: float) -> Finding:
    """With the teacher at ``root`` (None: a stand-in without weights), in the cluster or else in this process."""
    source: TeacherSource = root or FakeTeacher.factory()
    images = torch.randint(0, 256, (_BATCH, 3, 224, 224), dtype=torch.uint8)
    began = time.monotonic()
    try:
        pool = TeacherPool.start(
            source, name=f"doctor-{os.getpid()}", replicas=1, local_mode=not in_cluster, timeout=timeout
        )
        with pool, pool.teacher(timeout=timeout) as teacher:
            up = time.monotonic()
            tokens_BD = teacher.extract(images, _SPEC).cls
            first = time.monotonic()
            teacher.extract(images, _SPEC)
            again = time.monotonic()
    except DinoV3Error as error:
        remedy = "the message says what the replica ran into; its own log has the rest (deploy/README.md, Logs)"
        return problem(_SUBJECT, str(error), remedy)
    assert tokens_BD is not None
    if not torch.isfinite(tokens_BD).all():
        return problem(_SUBJECT, "features are not finite", "dinov3-ray checkpoint verify, and try dtype float32")
    where = "in the cluster" if in_cluster else "in this process"
    what = "" if root else " (a stand-in without weights: name a model with --root)"
    return fine(
        _SUBJECT,
        f"a replica {where}{what} was up after {up - began:.1f} s; {_BATCH} images took {1e3 * (first - up):.0f} ms "
        f"at first, {1e3 * (again - first):.0f} ms then",
    )
