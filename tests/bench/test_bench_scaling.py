"""The scaling bench: its cost model, and what it shows."""

from __future__ import annotations

import pytest
from rich.console import Console

from dinov3_ray.bench.cost import Costs, Line, Spent, Workload
from dinov3_ray.bench.scaling import BatchShape, Scaling, ScalingPlan, ScalingPoint

MIB = 2**20
COSTS = Costs(cores=2, cpu=Line(0.01, 0.001 / MIB), client=Line(0.002, 0.0), copy_rate=8 * 2**30)


def test_costs_go_through_both_points() -> None:
    costs = Costs.calibrated(2, 1e9, Spent(MIB, cpu=0.011, client=0.002), Spent(21 * MIB, cpu=0.031, client=0.002))
    assert costs.cpu.at(MIB) == pytest.approx(0.011)
    assert costs.cpu.at(11 * MIB) == pytest.approx(0.021)
    assert (costs.client.fixed, costs.client.per_byte) == pytest.approx((0.002, 0.0))


@pytest.mark.parametrize(("small", "large"), [(0.02, 0.01), (0.001, 0.1)])
def test_noise_gives_no_negative_costs(small: float, large: float) -> None:
    line = Line.through((MIB, small), (10 * MIB, large))
    assert min(line.fixed, line.per_byte) >= 0
    assert line.at(10 * MIB) == pytest.approx(large)


@pytest.mark.parametrize(
    ("load", "network", "rate", "wall"),
    [
        (Workload(4, 1, 32, 10 * MIB, 0.04), None, 100.0, "accelerators"),
        (Workload(4, 1, 32, 10 * MIB, 0.08), None, 50.0, "accelerators"),
        (Workload(32, 1, 32, 10 * MIB, 0.04), None, 100.0, "CPU"),
        (Workload(32, 1, 32, 10 * MIB, 0.0), None, 100.0, "CPU"),
        (Workload(4, 1, 32, 10 * MIB, 0.04), 100 * MIB, 10.0, "network"),
        (Workload(4, 3, 32, 10 * MIB, 0.04), 100 * MIB, 30.0, "network"),
    ],
)
def test_the_slowest_part_is_the_wall(load: Workload, network: float | None, rate: float, wall: str) -> None:
    assert COSTS.predict(load, network) == (pytest.approx(rate), wall)


def test_one_client_and_memory_are_walls_too() -> None:
    many = Costs(cores=64, cpu=COSTS.cpu, client=COSTS.client, copy_rate=8 * 2**30)
    assert many.predict(Workload(64, 1, 32, 10 * MIB, 0.04)) == (pytest.approx(500), "client")
    assert many.predict(Workload(64, 16, 32, 64 * MIB, 0.01)) == (pytest.approx(128), "memory")


def test_what_was_measured_is_shown() -> None:
    loads = [BatchShape().load(replicas) for replicas in (1, 32)]
    points = [
        ScalingPoint("replicas", load.replicas, load, 25.0, *COSTS.predict(load), COSTS.walls(load), cpu=1.5)
        for load in loads
    ]
    result = Scaling(ScalingPlan(), COSTS, tuple(points), "a machine")
    console = Console(width=80)
    with console.capture() as capture:
        console.print(*result.tables())
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in capture.get().splitlines()]
    assert ["1 replica", "16.8", "800", "800", "1.00", "1.5", "accelerators"] in rows
    (last,) = (row for row in rows if row[0] == "32 replicas")
    assert last[-1] == "CPU"
