"""The command ``dinov3-ray bench router``."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table

from dinov3_ray.bench.router import measure_router
from dinov3_ray.bench.throughput import describe_machine

__all__ = ["router"]

_REPLICAS = (1, 4, 16, 100, 1000, 10_000)


@click.command()
@click.option("--requests", default=20_000, show_default=True, type=click.IntRange(1), help="Of a run.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Runs that count.")
@click.option("--quick", is_flag=True, help="A tenth of the requests, one run: to see that it works.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
def router(requests: int, repeats: int, quick: bool, as_json: bool) -> None:
    """What the choice of a replica takes, in pools of 1 to 10,000 replicas. Needs no Ray."""
    requests, repeats = (max(1, requests // 10), 1) if quick else (requests, repeats)
    decisions = [measure_router(replicas, requests, repeats) for replicas in _REPLICAS]
    if as_json:
        report = {"machine": describe_machine(), "decisions": [asdict(decision) for decision in decisions]}
        click.echo(json.dumps(report, indent=2))
        return
    table = Table(
        title="One request in the routing book",
        caption=f"medians of {repeats} runs of {requests} requests, after one to warm up\n{describe_machine()}",
    )
    for heading in ("replicas", "choice, \u00b5s", "slowest run", "with submission and answer, \u00b5s"):
        table.add_column(heading, justify="right")
    for one in decisions:
        table.add_row(
            f"{one.replicas:,}", *(f"{seconds * 1e6:.1f}" for seconds in (one.choice, one.choice_slowest, one.whole))
        )
    Console().print(table)
