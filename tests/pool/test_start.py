"""What TeacherPool.start makes of a pool that runs already, and of GPUs that are for others; in this process."""

from __future__ import annotations

import logging

import pytest
import torch

from dinov3_ray import FeatureSpec, TeacherPool
from dinov3_ray.errors import ConfigError, PoolClosedError, PoolExistsError
from dinov3_ray.pool.local import local_pool
from dinov3_ray.pool.spec import replicas_for
from dinov3_ray.testing import FakeTeacher

IMAGES = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
SPEC = FeatureSpec(cls=True)


def start(hidden_size: int = 16, **arguments: object) -> TeacherPool:
    factory = FakeTeacher.factory(hidden_size=hidden_size)
    return TeacherPool.start(factory, name="shared", local_mode=True, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_a_pool_that_two_have_started_ends_with_the_last_of_them(first_to_leave: int) -> None:
    pools = [start(exist="connect"), start(exist="connect")]
    first, last = pools[first_to_leave], pools[1 - first_to_leave]
    assert first.status().replicas[0].replica_id == last.status().replicas[0].replica_id
    first.shutdown()
    first.shutdown()  # counts once
    with pytest.raises(PoolClosedError):
        first.status()
    with last:
        assert last.teacher().extract(IMAGES, SPEC).cls is not None
    assert local_pool("shared") is None


def test_whoever_started_it_alone_ends_it_for_all() -> None:
    owner = start()
    joined = start(exist="connect")
    teacher = joined.teacher()
    assert teacher.extract(IMAGES, SPEC).cls is not None
    owner.shutdown()
    with pytest.raises(PoolClosedError, match="'shared' was shut down"):
        teacher.extract(IMAGES, SPEC)
    joined.shutdown()


def test_another_teacher_is_an_error_that_names_the_difference_and_other_options_are_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with start(exist="connect", max_batch=4) as pool:
        with pytest.raises(PoolExistsError, match=r"with another teacher \(teacher: .*16.* -> .*32") as caught:
            start(hidden_size=32, exist="connect")
        assert "give this one another name" in str(caught.value)
        with caplog.at_level(logging.WARNING, "dinov3_ray"), start(exist="connect", max_batch=8, replicas=2):
            assert pool.status().target == 1, "it stays as it is"
        assert "options.max_batch: 4 -> 8" in caplog.text
        assert "replicas: 1 -> 2" in caplog.text
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dinov3_ray"), start(exist="connect", max_batch=4):
            assert caplog.text == ""
        with pytest.raises(PoolExistsError, match="is running in this process already"):
            start(max_batch=4)
        assert pool.status().ready == 1


def test_a_pool_of_this_process_cannot_outlive_it() -> None:
    with pytest.raises(ConfigError, match=r"runs in this process, and ends with it; got lifetime='detached'"):
        start(lifetime="detached")


@pytest.mark.parametrize(
    ("total", "free", "each", "leave", "replicas"),
    [
        (0, 0, 0, 0, 1),  # no GPUs
        (8, 8, 1, 0, 8),
        (8, 8, 1, 2, 6),
        (8, 6, 1, 2, 6),  # the trainer has them already
        (8, 3, 1, 2, 3),  # others have more
        (8, 0, 1, 2, 1),  # it waits for one
        (2, 2, 0.5, 1, 2),
        (2, 2, 0.5, 1.5, 1),
        (4, 4, 2, 1, 1),
        (8, 8, 0, 8, 1),  # on CPUs it takes none
    ],
)
def test_auto_leaves_gpus_whether_others_have_them_yet_or_not(
    total: float, free: float, each: float, leave: float, replicas: int
) -> None:
    assert replicas_for(total=total, free=free, each=each, leave=leave) == replicas


def test_leaving_more_than_there_is_to_leave() -> None:
    with pytest.raises(ConfigError, match=r"leave_gpus=2 must leave the pool num_gpus=1 of the cluster's 2 GPUs"):
        replicas_for(total=2, free=2, each=1, leave=2)
    for value in (-1, True, "2", float("nan"), float("inf"), None):
        with pytest.raises(ConfigError, match=f"leave_gpus must be a number of GPUs, at least 0; got {value!r}"):
            start(leave_gpus=value)
