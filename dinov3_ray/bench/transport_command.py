"""The command ``dinov3-ray bench transport``."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table

from dinov3_ray.bench.running import running
from dinov3_ray.bench.simulated import Work
from dinov3_ray.bench.throughput import describe_machine
from dinov3_ray.bench.transport import measure_transport

__all__ = ["transport"]


@click.command()
@click.option("--repeats", default=50, show_default=True, type=click.IntRange(1), help="Results that count.")
@click.option("--quick", is_flag=True, help="A tenth of the results: to see that it works.")
@click.option("--address", help="host:port of a running Ray; else RAY_ADDRESS, or a Ray of its own.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
def transport(repeats: int, quick: bool, address: str | None, as_json: bool) -> None:
    """How fast one result reaches the client.

    A map [32, 1024, 14, 14], beside a plain actor that returns the torch tensor; and one image's CLS token, beside a
    bare async actor's method that does nothing.
    """
    repeats = max(1, repeats // 10) if quick else repeats
    with running(address) as step:
        step("results")
        result = measure_transport(Work(seconds=0.0, pixels=16), repeats)
    if as_json:
        click.echo(
            json.dumps(
                {
                    **asdict(result),
                    "ratio": result.ratio,
                    "token_ratio": result.token_ratio,
                    "machine": describe_machine(),
                },
                indent=2,
            )
        )
        return
    size = result.result_bytes / 2**20
    table = Table(title=f"One result of {size:.1f} MiB, and one token", caption=f"medians\n{describe_machine()}")
    for heading in ("", "ms", "results/s"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {
        "map, RemoteTeacher.extract": result.pool,
        "map, plain actor that returns the torch tensor": result.torch_actor,
        "bound: the map copied once in memory": result.copy,
        "CLS token of one image, RemoteTeacher.extract": result.token,
        "bound: a bare async actor's call": result.nothing,
    }
    for name, seconds in rows.items():
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{1 / seconds:.0f}")
    Console().print(
        table,
        f"map: {result.ratio:.1f} times the plain actor's rate; token: {result.token_ratio:.1f} times a bare call",
    )
