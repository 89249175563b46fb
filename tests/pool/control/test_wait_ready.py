"""Waiting for a pool whose controller was restarted meanwhile, and has lost its list of errors."""

from __future__ import annotations

import pytest

from dinov3_ray.errors import ReplicaError
from dinov3_ray.pool.control.membership import Membership
from dinov3_ray.pool.control.remote_control import wait_ready
from dinov3_ray.pool.control.status import PoolStatus, make_status
from dinov3_ray.pool.spec import PoolOptions


class RestartedPool:
    """A pool without replicas and without errors. ``restarts`` goes up with each look."""

    def __init__(self) -> None:
        self.members = Membership(1, 1)

    def status(self) -> PoolStatus:
        status = make_status("test", self.members, {}, PoolOptions(), clients=0)
        self.members.restarts += 1
        return status


def test_a_reload_that_was_given_up_before_the_restart_is_reported_without_its_reason():
    pool = RestartedPool()
    pool.members.newest = 1
    with pytest.raises(ReplicaError, match=r"gone back to the former teacher .* reason was lost"):
        wait_ready(pool, "test", 5, generation=1)


def test_replicas_that_do_not_start_after_the_restart_are_reported_without_a_reason():
    with pytest.raises(ReplicaError, match=r"do not start\. The reason was lost"):
        wait_ready(RestartedPool(), "test", 5)
