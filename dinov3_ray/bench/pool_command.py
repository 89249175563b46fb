"""The command ``dinov3-ray bench pool``."""

from __future__ import annotations

import json

import click
from rich.console import Console

from dinov3_ray.bench.running import running
from dinov3_ray.bench.simulated import Work
from dinov3_ray.bench.throughput import measure

__all__ = ["pool"]


@click.command()
@click.option("--replicas", default=4, show_default=True, type=click.IntRange(1), help="Simulated accelerators.")
@click.option("--batches", default=100, show_default=True, type=click.IntRange(1), help="Batches in each run.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1), help="Runs that count.")
@click.option("--quick", is_flag=True, help="A fifth of the batches, one run: to see that it works.")
@click.option("--address", help="host:port of a running Ray; else RAY_ADDRESS, or a Ray of its own.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
def pool(replicas: int, batches: int, repeats: int, quick: bool, address: str | None, as_json: bool) -> None:
    """What a pool delivers of its accelerators' speed, beside ActorPool, Serve and Ray Data.

    The accelerators are simulated: they wait 40 ms for 32 images and hand out maps of a ViT-L/16 at 224 px. What is
    missing to 100% is what moving and steering the work costs on this machine.
    """
    work = Work(batches=max(1, batches // 5) if quick else batches, replicas=replicas)
    with running(address) as step:
        result = measure(work, 1 if quick else repeats, step)
    if as_json:
        click.echo(json.dumps(result.as_dict(), indent=2))
    else:
        Console().print(result.table())
