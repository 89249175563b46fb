"""The command ``dinov3-ray bench training``."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from dinov3_ray.bench.running import running
from dinov3_ray.bench.throughput import describe_machine
from dinov3_ray.bench.training import EPOCH, Setting, Timings, measure_training

__all__ = ["table_of", "training"]


@click.command()
@click.option(
    "--replicas",
    multiple=True,
    default=(2, 4),
    show_default=True,
    type=click.IntRange(1),
    help="Of the pool; may be repeated, for one pool after the other.",
)
@click.option("--steps", default=40, show_default=True, type=click.IntRange(2), help="Of a pass over the loader.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1), help="Passes that count.")
@click.option(
    "--step-seconds",
    default=0.3,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Of the student, for 32 images.",
)
@click.option(
    "--capacity",
    default=1.5,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Of the whole pool, over what the student needs.",
)
@click.option("--quick", is_flag=True, help="A fourth of the steps, one pass: to see that it works.")
@click.option("--address", help="host:port of a running Ray; else RAY_ADDRESS, or a Ray of its own.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the tables.")
def training(
    replicas: tuple[int, ...],
    steps: int,
    repeats: int,
    step_seconds: float,
    capacity: float,
    quick: bool,
    address: str | None,
    as_json: bool,
) -> None:
    """What a training step takes with its teacher in a pool, over the same step without a teacher.

    Student and teachers are simulated: devices that are busy for a given time and compute nothing. Targets ahead of the
    loop (prefetch) stand beside a teacher in the loop that takes as long as the student, and beside a batch that is
    submitted and waited for within its step. What an epoch's first batch waits, which nothing can be ahead of, is the
    fill, reported for itself and within an epoch of so many steps.
    """
    if quick:
        steps, repeats = max(2, steps // 4), 1
    settings = [
        Setting(replicas=number, steps=steps, repeats=repeats, step_seconds=step_seconds, capacity=capacity)
        for number in replicas
    ]
    with running(address) as step:
        measured = [measure_training(setting, step) for setting in settings]
    if as_json:
        pools = [timings.as_dict() for timings in measured]
        click.echo(json.dumps({"machine": describe_machine(), "pools": pools}, indent=2))
        return
    for timings in measured:
        Console().print(table_of(timings))


def table_of(timings: Timings) -> Table:
    """What was measured, for people."""
    setting = timings.setting
    table = Table(
        title=f"{setting.replicas} replicas of {setting.work.seconds * 1e3:g} ms a batch, together "
        f"{setting.capacity:g} times what a student of {setting.step_seconds * 1e3:g} ms a step needs",
        caption=f"ratios over teacher-free; medians of {setting.repeats} passes of {setting.steps} steps (the last two "
        f"kinds: a fourth), after a short one\nprefetch over an epoch of {EPOCH:,} steps, its fill included: "
        f"{timings.epoch_ratio('prefetch', EPOCH):.3f} (computed)\n{describe_machine()}",
    )
    for heading in ("", "ms a step", "ratio", "waiting", "fill, s", "ratio with fill"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in timings.rows():
        table.add_row(*row)
    return table
