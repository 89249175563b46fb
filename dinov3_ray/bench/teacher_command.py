"""The command ``dinov3-ray bench teacher``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
from rich.console import Console

from dinov3_ray.bench.teacher import TeacherBench, measure_teacher
from dinov3_ray.bench.teachers import Task
from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.checkpoint.variants import find_variant, variant_of
from dinov3_ray.config import DinoV3Config
from dinov3_ray.model.device import as_device

__all__ = ["teacher"]


@click.command()
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option("--root", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A checkpoint of your own.")
@click.option("--variant", default="vitb16", show_default=True, help="Random weights of this variant, without --root.")
@click.option("--image-size", type=click.IntRange(16), default=512, show_default=True, help="Of the model's input.")
@click.option("--batch", type=click.IntRange(1), help="Images a batch.  [default: 4 on a CPU, else 32]")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Runs that count.")
@click.option("--target-rate", type=click.FloatRange(min=0, min_open=True), help="img/s to size a pool for.")
@click.option("--quick", is_flag=True, help="One run, nothing compiled: to see that it works.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
def teacher(
    device: str,
    root: Path | None,
    variant: str,
    image_size: int,
    batch: int | None,
    repeats: int,
    target_rate: float | None,
    quick: bool,
    as_json: bool,
) -> None:
    """How fast one teacher computes, beside transformers and this device's own bound; sizes a pool.

    Each batch starts as uint8 images in the host's memory and ends as CLS tokens and maps on the device ("to the host":
    in the host's memory, through a replica's pipeline). Resizing and normalizing is part of the work.
    """
    where = as_device(device)
    batch = batch or (4 if where.type == "cpu" else 32)

    def run(path: Path) -> TeacherBench:
        config = DinoV3Config(path, image_size=image_size)
        name = variant_of(config.architecture) or str(path)
        with Console(stderr=True).status("starting") as status:
            return measure_teacher(
                Task(config, where, batch),
                model=name,
                repeats=1 if quick else repeats,
                quick=quick,
                target=target_rate,
                on_step=lambda step: status.update(f"measuring {step}"),
            )

    if root is not None:
        result = run(root)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = run(init_checkpoint(find_variant(variant), Path(folder) / "model"))
    if as_json:
        click.echo(json.dumps(result.as_dict(), indent=2))
    else:
        Console().print(result.table(), result.advice())
