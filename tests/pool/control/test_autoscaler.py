"""How many replicas the load asks for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov3_ray.pool.control.autoscaler import Autoscaler, expected_wait
from dinov3_ray.pool.messages import ReplicaStatistics

# Has computed 100 images at 10 per second, and stands still.
IDLE = ReplicaStatistics(images=100, forward_seconds=10.0)


def an_autoscaler() -> Autoscaler:
    return Autoscaler(busy_seconds=0.5, idle_seconds=30.0)


def busy(waiting_rows: int, backlog: int = 0, oldest_wait: float = 0.0) -> ReplicaStatistics:
    return ReplicaStatistics(
        images=100,
        forward_seconds=10.0,
        waiting=1,
        waiting_rows=waiting_rows,
        clients_backlog=backlog,
        oldest_wait=oldest_wait,
        busy_for=0.1,
    )


def test_grows_by_one_when_more_waits_than_is_done_in_time() -> None:
    scaler = an_autoscaler()
    assert scaler.target(2, [busy(5), busy(5)], 0, 0.0) == 2  # 0.5 s of work each: just in time
    assert scaler.target(2, [busy(5), busy(7)], 0, 1.0) == 3


def test_what_clients_hold_back_counts_and_once() -> None:
    # One client with 20 rows tells both replicas of them: 20 rows at 10 per second, between two.
    assert expected_wait([busy(0, backlog=20), busy(0, backlog=20)]) == pytest.approx(1.0)
    assert an_autoscaler().target(2, [busy(0, backlog=20), busy(0, backlog=20)], 0, 0.0) == 3


def test_a_request_that_has_waited_long_is_proof_enough() -> None:
    """Before the first answer there is no measured speed."""
    fresh = ReplicaStatistics(waiting=1, waiting_rows=1, oldest_wait=2.0, busy_for=2.0)
    assert expected_wait([fresh]) == 2.0
    assert an_autoscaler().target(1, [fresh], 0, 0.0) == 2


@pytest.mark.parametrize(("ready", "starting"), [(2, 1), (1, 0)])
def test_does_not_grow_while_replicas_are_starting_or_missing(ready: int, starting: int) -> None:
    assert an_autoscaler().target(2, [busy(1000)] * ready, starting, 0.0) == 2


def test_shrinks_by_one_after_each_idle_time() -> None:
    scaler, targets = an_autoscaler(), []
    target = 3
    for second in range(100):
        target = scaler.target(target, [IDLE] * 3, 0, float(second))
        targets.append(target)
    assert targets == [3] * 31 + [2] * 30 + [1] * 30 + [0] * 9  # its owner keeps it above the minimum


@pytest.mark.parametrize(
    "sign",
    [
        ReplicaStatistics(images=101, forward_seconds=10.1),
        ReplicaStatistics(images=100, waiting=1),
        ReplicaStatistics(images=100, busy_for=0.1),
        ReplicaStatistics(images=100, clients_backlog=1),
    ],
    ids=["computed", "waiting", "computing", "backlog"],
)
def test_any_sign_of_work_ends_the_idle_time(sign: ReplicaStatistics) -> None:
    scaler = an_autoscaler()
    for second in range(30):
        assert scaler.target(2, [IDLE], 0, float(second)) == 2
    assert scaler.target(2, [sign], 0, 30.0) == 2
    for second in range(31, 61):
        assert scaler.target(2, [IDLE if sign.images == 100 else sign], 0, float(second)) == 2
    assert scaler.target(2, [IDLE if sign.images == 100 else sign], 0, 61.0) == 1


def test_a_pool_without_a_replica_is_not_idle() -> None:
    """All have died under the load, or are starting: nobody can say whether there is work."""
    scaler = an_autoscaler()
    assert expected_wait([]) == 0.0
    for second in range(100):
        assert scaler.target(4, [], 4, float(second)) == 4


@given(
    current=st.integers(1, 20),
    starting=st.integers(0, 3),
    looks=st.lists(st.lists(st.integers(0, 500), max_size=5), min_size=1, max_size=30),
)
def test_moves_by_one_at_a_time_whatever_it_sees(current: int, starting: int, looks: list[list[int]]) -> None:
    scaler = an_autoscaler()
    for second, rows in enumerate(looks):
        seen = [ReplicaStatistics(images=10, forward_seconds=1.0, waiting=n, waiting_rows=n) for n in rows]
        target = scaler.target(current, seen, starting, 10.0 * second)
        assert abs(target - current) <= 1
        assert not (target > current and starting)
        assert not (target < current and any(rows))
