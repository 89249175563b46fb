"""The command ``dinov3-ray bench scaling``."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from dinov3_ray.bench.cost import COPIES, Line
from dinov3_ray.bench.running import running
from dinov3_ray.bench.scaling import QUICK, Plan, Scaling, Shape, measure_scaling
from dinov3_ray.bench.scaling_plot import LABELS, save_plots

__all__ = ["scaling", "table_of", "walls_of"]

_OBJECT_STORE_BYTES = 4 * 2**30
_NAMES = {"replicas": "{0} replica", "batch": "batch of {0}", "map": "map {0} x {0}", "clients": "{0} client"}
_COUNTED = ("replicas", "clients")


@click.command()
@click.option("--seconds", type=click.FloatRange(0.1), help="That count, of each point.  [default: 3; quick: 1]")
@click.option(
    "--network",
    default=25.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Gbit/s of a client elsewhere.",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for plots (PNG).")
@click.option("--quick", is_flag=True, help="Few points, to 4 replicas and 2 clients: to see that it works.")
@click.option("--address", help="host:port of a running Ray on this machine; else RAY_ADDRESS, or a Ray of its own.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the tables.")
def scaling(
    seconds: float | None, network: float, out: Path | None, quick: bool, address: str | None, as_json: bool
) -> None:
    """What a pool costs as work grows: replicas, images a batch, sizes of maps, clients; and where the wall is.

    Accelerators are simulated: they wait 40 ms for 32 images. What batches cost is measured with one replica and two
    sizes of batches; from that, a small model predicts the rest, which is measured beside it. --network is only
    calculated with, for clients on other nodes. All points take about four minutes, 16 client processes and 32 replicas
    about 10 GiB of memory.
    """
    plan = QUICK if quick else Plan()
    if seconds is not None:
        plan = replace(plan, seconds=seconds)
    logger = logging.getLogger("dinov3_ray")
    level = logger.level
    logger.setLevel(logging.ERROR)  # each stream would be told that it waits for its teacher
    try:
        with running(address, store_bytes=_OBJECT_STORE_BYTES) as step:
            result = measure_scaling(plan, step)
    finally:
        logger.setLevel(level)
    saved = [] if out is None else save_plots(result, out)
    bytes_per_second = network * 1e9 / 8
    if as_json:
        _, walls = _walls(result, bytes_per_second)
        report = result.as_dict() | {"walls": walls, "plots": [str(path) for path in saved]}
        click.echo(json.dumps(report, indent=2))
        return
    console = Console()
    console.print(table_of(result))
    console.print(walls_of(result, bytes_per_second))
    for path in saved:
        console.print(f"plot: {path}", soft_wrap=True)


def table_of(result: Scaling) -> Table:
    """Each point, measured beside predicted."""
    costs = result.costs
    table = Table(
        title="A pool as work grows",
        caption="MiB: a batch, in and out; ratio: predicted over measured\nsimulated accelerators, 40 ms for 32 images "
        "of 224 px; where nothing else is said, 1 client, batches of 32,\n"
        f"maps 14 x 14 and {result.plan.base} replicas\ncosts, from 1 replica and two sizes: "
        f"{_line(costs.cpu)} of CPU; of these in the client {_line(costs.client)}\n{result.machine}",
    )
    for heading in ("", "MiB", "img/s", "predicted", "ratio", "cores busy", "the wall"):
        table.add_column(heading, justify="left" if heading in ("", "the wall") else "right", no_wrap=True)
    for axis in LABELS:
        for point in result.points:
            if point.axis != axis:
                continue
            table.add_row(
                _NAMES[axis].format(point.value) + ("s" if axis in _COUNTED and point.value > 1 else ""),
                f"{point.load.nbytes / 2**20:.1f}",
                f"{point.measured * point.load.rows:.0f}",
                f"{point.predicted * point.load.rows:.0f}",
                f"{point.ratio:.2f}",
                "-" if point.cpu is None else f"{point.cpu:.1f}",
                point.wall,
            )
        table.add_section()
    return table


def _line(line: Line) -> str:
    return f"{line.fixed * 1e3:.2f} ms a batch and {line.per_byte * 2**20 * 1e3:.3f} ms a MiB"


def walls_of(result: Scaling, network: float) -> Table:
    """What each part allows by itself, for the usual batch and for a small map."""
    shapes, walls = _walls(result, network)
    table = Table(
        title="What each part allows by itself",
        caption=f"accelerators of 40 ms for 32 images that it feeds, batches of 32; one node of {result.costs.cores} "
        f"cores that copies {result.costs.copy_rate / 2**30:.1f} GiB/s ({COPIES} copy a byte), clients on other nodes "
        f"with {network * 8 / 1e9:g} Gbit/s each (calculated)",
    )
    table.add_column("")
    for shape in shapes:
        table.add_column(f"map {shape.side} x {shape.side}, {shape.nbytes / 2**20:.1f} MiB", justify="right")
    for wall, fed in walls.items():
        table.add_row(wall, *(f"{number:.1f}" for number in fed))
    return table


def _walls(result: Scaling, network: float) -> tuple[list[Shape], dict[str, list[float]]]:
    """Accelerators that each part keeps busy, by shape."""
    shapes = [Shape(side=7), Shape(), Shape(side=28)]
    names = {
        "CPU": "CPU of this node",
        "client": "one client's process",
        "memory": "memory of this node",
        "network": "one client's network",
    }
    rates = [(result.costs.walls(shape.load(1), network), shape.load(1).accelerator_seconds) for shape in shapes]
    return shapes, {label: [walls[name] * seconds for walls, seconds in rates] for name, label in names.items()}
