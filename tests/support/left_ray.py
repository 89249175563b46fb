"""A notebook in which somebody calls ray.shutdown() while a pool is in use; prints what each entrance says then."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from lean_ray import start_lean_rays
from PIL import Image

from dinov3_ray import FeatureSpec, RemoteTeacher, TeacherPool
from dinov3_ray.datasets import extract
from dinov3_ray.pool.cluster import connect
from dinov3_ray.testing import FakeTeacher

IMAGES = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).remainder(256).to(torch.uint8)
SPEC = FeatureSpec(cls=True)
OPTIONS: dict[str, Any] = {"replicas": 1, "num_cpus": 1, "threads": 1, "num_gpus": 0}

seen: dict[str, str] = {"Ray after each": "never"}


def say(entrance: str, call: Callable[[], object]) -> None:
    try:
        call()
        seen[entrance] = "nothing"
    except Exception as error:  # noqa: BLE001 - it is what is looked for
        seen[entrance] = f"{type(error).__name__}: {error}"
    if ray.is_initialized() and "new" not in entrance and "another" not in entrance:
        seen["Ray after each"] = entrance


def main(images: Path) -> None:
    start_lean_rays()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(images / "black.png")
    pool = TeacherPool.start(FakeTeacher.factory(delay=0.2), name="left", **OPTIONS)
    context = pool.__enter__()
    remote = pool.teacher(attempt_timeout=8.0)
    kept = remote.extract(IMAGES, SPEC)
    connected, later = TeacherPool.connect("left"), TeacherPool.connect("left")
    asked_later = later.teacher()
    asked_later.extract(IMAGES, SPEC)
    many = [remote.submit(IMAGES, SPEC) for _ in range(200)]
    ray.shutdown()
    began = time.monotonic()
    say("in flight", many[-1].result)
    seen["seconds in flight"] = str(time.monotonic() - began)
    say("extract", lambda: remote.extract(IMAGES, SPEC))
    say("submit", lambda: remote.submit(IMAGES, SPEC))
    say("info", lambda: remote.info)
    say("prefetch", lambda: next(iter(remote.prefetch([IMAGES], SPEC))))
    say("teacher", lambda: pool.teacher().extract(IMAGES, SPEC))
    say("status", pool.status)
    say("scale", lambda: pool.scale(2))
    say("reload", lambda: pool.reload(FakeTeacher.factory()))
    say("repr", lambda: (repr(pool), repr(remote)))
    say("datasets' extract", lambda: extract(images, images / "out", pool="left", spec=SPEC))
    say("shutdown of a connected pool", connected.shutdown)
    say("close", remote.close)
    say("exit of a context", lambda: context.__exit__(None, None, None))
    say("shutdown", pool.shutdown)
    say("second shutdown", pool.shutdown)
    expected = FakeTeacher().extract(IMAGES, SPEC).cls
    assert kept.cls is not None
    assert expected is not None
    seen["a result that was there"] = "equal" if torch.equal(kept.cls, expected) else "another"
    if os.environ.get("RAY_ADDRESS"):
        say("a new client", lambda: RemoteTeacher("elsewhere").extract(IMAGES, SPEC))
    # Somebody has not only left Ray, but joined it again, or another one: that connection is not the pool's.
    ray.shutdown()
    connect(may_start=True)
    say("extract in another Ray", lambda: asked_later.extract(IMAGES, SPEC))
    say("status in another Ray", later.status)
    asked_later.close()
    say("shutdown in another Ray", later.shutdown)
    seen["the other Ray"] = "is there" if ray.is_initialized() else "was shut down"
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
