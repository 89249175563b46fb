"""A pool's status as text: rates from snapshots, and what a person gets to read."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from dinov3_ray.cli.table import ReplicaRate, is_healthy, rates, render, summary
from dinov3_ray.pool.control.status import PoolStatus, ReplicaStatus
from dinov3_ray.pool.messages import ReplicaStatistics

READY = ReplicaStatus(
    replica_id="r0",
    state="ready",
    generation=1,
    seconds_in_state=3723.0,
    node_id="12bf17bd37f2fa92",
    pid=6821,
    fingerprint="74b0df3baae2b95f216c65c3",
    device="cuda:0",
    golden_cosine=0.99987,
    statistics=ReplicaStatistics(
        uptime=100.0, images=5000, preprocess_seconds=10.0, forward_seconds=35.0, pack_seconds=5.0, errors=2, waiting=3
    ),
)
FORMER = replace(READY, replica_id="r1", state="draining", generation=0, seconds_in_state=13.0)
STARTING = ReplicaStatus("r2", "starting", 1, 90_061.0)


def status(*replicas: ReplicaStatus, target: int = 2, recent_errors: tuple[str, ...] = ()) -> PoolStatus:
    return PoolStatus(
        name="dinov3",
        epoch=1,
        generation=1,
        newest_generation=1,
        reloading=False,
        target=target,
        low=2,
        high=8,
        replicas=replicas,
        fingerprint="74b0df3baae2b95f216c65c3",
        teacher="DinoV3Teacher",
        batching="exact",
        clients=1,
        restarts=len(recent_errors),
        recent_errors=recent_errors,
    )


def later(replica: ReplicaStatus, **growth: float) -> ReplicaStatus:
    assert replica.statistics is not None
    grown = {name: getattr(replica.statistics, name) + by for name, by in growth.items()}
    return replace(replica, statistics=replace(replica.statistics, **grown))  # type: ignore[arg-type]


def text(seen: PoolStatus, rate: dict[str, ReplicaRate], width: int = 140) -> str:
    written = io.StringIO()
    Console(file=written, width=width).print(render(seen, rate))
    return written.getvalue()


def test_rates_since_the_start() -> None:
    assert rates(None, status(READY, STARTING)) == {"r0": ReplicaRate(images_per_second=50.0, busy=0.5)}


def test_rates_between_snapshots_go_by_the_replicas_own_time() -> None:
    before = status(READY, FORMER)
    # r0 told twice in between and did 100 images in 2 s, 1.5 s of them busy; r1 told nothing; r2 is new.
    new = replace(STARTING, statistics=ReplicaStatistics(uptime=4.0, images=8, forward_seconds=1.0))
    after = status(later(READY, uptime=2.0, images=100, forward_seconds=1.0, pack_seconds=0.5), FORMER, new)
    assert rates(before, after) == {"r0": ReplicaRate(50.0, 0.75), "r2": ReplicaRate(2.0, 0.25)}


def test_a_pass_longer_than_the_interval_is_no_more_than_all_of_it() -> None:
    after = status(later(READY, uptime=1.0, images=32, forward_seconds=9.0))
    assert rates(status(READY), after)["r0"].busy == 1.0


def test_health_and_summary() -> None:
    assert not is_healthy(status(READY, FORMER, STARTING))
    assert summary(status(READY, FORMER, STARTING)) == ("1 of 2 ready; 1 draining with the former teacher; 1 starting")
    assert is_healthy(status(READY, replace(READY, replica_id="r3")))
    assert summary(status(target=1)) == "0 of 1 ready"


def test_what_a_person_reads() -> None:
    seen = status(READY, FORMER, STARTING, recent_errors=("r9: its process died", "r8: [no markup] at all"))
    lines = [" ".join(line.split()) for line in text(seen, rates(None, seen)).splitlines()]
    assert lines[0] == (
        "dinov3 degraded 1 of 2 ready (2-8 allowed) · DinoV3Teacher 74b0df3baae2 · exact batching · 1 client · "
        "2 restarts · 1 reload"
    )
    assert "replica state node pid device img/s busy queue images errors golden teacher" in lines
    assert "r0 ready 1h2m 12bf17bd 6821 cuda:0 50.0 50% 3 5,000 2 0.99987 74b0df3baae2" in lines
    assert "r2 starting 1d1h - - - - - - - - - -" in lines
    assert "all 100 50% 6 10,000 4" in lines
    assert lines[-2:] == ["last errors r9: its process died", "r8: [no markup] at all"]


def test_replicas_whose_device_is_too_small_are_named_by_size() -> None:
    small = [
        later(replace(READY, replica_id=f"r{number}"), fitting_batch=size) for number, size in enumerate((8, 0, 8, 1))
    ]
    lines = [" ".join(line.split()) for line in text(status(*small), {}).splitlines()]
    assert lines[-2:] == [
        "memory r3: batches are computed in parts of 1, since more did not fit the device",
        "r0, r2: batches are computed in parts of 8, since more did not fit the device",
    ]


def test_an_empty_pool_can_be_shown() -> None:
    seen = replace(status(target=1), teacher="", fingerprint=None, generation=0)
    assert "0 of 1 ready (2-8 allowed) · teacher not known yet · exact batching" in text(seen, rates(None, seen))


@pytest.mark.parametrize("width", [140, 100, 80, 60])
def test_a_narrow_terminal_gets_fewer_columns_rather_than_cut_ones(width: int) -> None:
    seen = status(READY, FORMER, STARTING)
    lines = text(seen, rates(None, seen), width).splitlines()
    header = next(line for line in lines if "replica" in line)
    assert {"replica", "state", "img/s", "busy", "queue", "errors"} <= set(header.split())
    assert ("teacher" in header) == (width == 140)
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= width
