"""The command ``dinov3-ray bench dataset``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
from rich.console import Console

from dinov3_ray.bench.dataset import DatasetWork, measure_dataset
from dinov3_ray.bench.running import running

__all__ = ["dataset"]


@click.command()
@click.option("--images", default=768, show_default=True, type=click.IntRange(64), help="Of each run; peers a quarter.")
@click.option("--variant", default="vits16", show_default=True, help="Of the teacher, whose weights are random.")
@click.option(
    "--compute-dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="Of extract and of the bare loop; plain transformers is in float32, as it comes.",
)
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1), help="Runs that count.")
@click.option("--quick", is_flag=True, help="64 images, one run, a tiny teacher: to see that it works.")
@click.option("--address", help="host:port of a running Ray; else RAY_ADDRESS, or a Ray of its own.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the tables.")
def dataset(
    images: int, variant: str, compute_dtype: str, repeats: int, quick: bool, address: str | None, as_json: bool
) -> None:
    """How fast extract runs, beside the bare loop over its teacher and plain Ray Data; and how fast a store is read."""
    work = DatasetWork(images=images, variant=variant, dtype=compute_dtype)  # type: ignore[arg-type]
    if quick:
        work, repeats = DatasetWork(images=64, variant="vit-test", dtype=work.dtype), 1
    with tempfile.TemporaryDirectory(prefix="dinov3-ray-bench-") as folder, running(address) as step:
        result = measure_dataset(work, repeats, Path(folder), step, quick=quick)
    if as_json:
        click.echo(json.dumps(result.as_dict(), indent=2))
    else:
        Console().print(*result.tables())
