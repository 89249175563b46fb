"""A training run's epochs over a pool of Ray actors, with a loader's workers and replicas that die."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from failing_loops import MistakeError, fail_in_body, fail_in_images, fail_in_loader, idle
from streams import Pictures, VariedBatches, picture
from torch.utils.data import DataLoader

from dinov3_ray import FeatureSpec, RemoteTeacher, TeacherPool
from dinov3_ray.testing import FakeTeacher

SPEC = FeatureSpec(cls=True, feature_map=True)
IMAGES = 60
KILLED: set[int] = set()  # the pool may not have noticed the last one yet


def live_pids(pool: TeacherPool) -> set[int]:
    return {replica.pid for replica in pool.status().replicas if replica.pid and replica.state == "ready"}


@pytest.fixture(scope="module")
def pool(ray_cluster: str) -> Iterator[TeacherPool]:
    options = {"health_interval": 0.2, "health_timeout": 6.0}
    with TeacherPool.start(FakeTeacher.factory(delay=0.02), name="epochs", replicas=2, **options) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_every_target_matches_its_batch_though_a_replica_is_killed_in_each_epoch(pool: TeacherPool, start: str) -> None:
    loader = DataLoader(
        Pictures(),
        batch_sampler=VariedBatches(IMAGES),
        num_workers=2,
        multiprocessing_context=start,
        persistent_workers=start == "spawn",  # which take seconds to start
    )
    fake = FakeTeacher()
    remote = pool.teacher()
    stream = remote.prefetch(loader, SPEC)
    killed_before = len(KILLED)
    for _ in range(3):
        seen: list[int] = []
        killed_now = False
        for batch, targets in stream:
            images, indices = batch["img"], batch["index"].tolist()
            wanted = [picture(index, images.shape[2:]) for index in indices]
            assert torch.equal(images, torch.stack(wanted))
            expected = fake.extract(images, SPEC)
            assert torch.equal(targets.cls, expected.cls)
            assert torch.equal(targets.feature_map, expected.feature_map)
            seen += indices
            if not killed_now and len(seen) >= IMAGES // 3:
                for victim in list(live_pids(pool) - KILLED)[:1]:  # none: then the next batch will do
                    os.kill(victim, signal.SIGKILL)
                    KILLED.add(victim)
                    killed_now = True
        assert sorted(seen) == list(range(IMAGES)), "each image once"
    assert len(KILLED) - killed_before == 3
    statistics = remote.statistics()
    assert statistics.in_flight == statistics.waiting == 0
    assert statistics.answered == stream.statistics().steps
    assert stream.statistics().resends == statistics.resends
    print(stream, stream.statistics(), statistics)


@pytest.mark.parametrize("fail", [fail_in_loader, fail_in_body, fail_in_images])
def test_an_error_leaves_nothing_in_flight(pool: TeacherPool, fail: Callable[[RemoteTeacher, Exception], None]) -> None:
    error = MistakeError("here")
    with pool.teacher() as remote:
        with pytest.raises(MistakeError) as raised:
            fail(remote, error)
        assert raised.value is error
        assert idle(remote)
