"""The command ``dinov3-ray demo``."""

from __future__ import annotations

from pathlib import Path

import click

from dinov3_ray.cli.teacher_options import model_options
from dinov3_ray.cli.values import address_option
from dinov3_ray.interrupts import Interrupts

__all__ = ["demo"]


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("dinov3-demo"),
    show_default=True,
    help="The folder for the loss curve, the pictures and summary.json.",
)
@click.option(
    "--images", type=click.Path(path_type=Path), help="A folder of your own photographs, instead of drawn scenes."
)
@click.option(
    "--trained",
    is_flag=True,
    help="A teacher that knows the scenes, and a probe of the student before and after. The teacher is made once, in "
    "minutes, and kept in the cache folder.",
)
@model_options("Your own teacher's model, instead of random weights")
@click.option("--steps", type=click.IntRange(min=2), default=150, show_default=True, help="Training steps.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=40.0,
    show_default=True,
    help="The longest time of training: a slow machine does fewer steps.",
)
@click.option("--replicas", type=click.IntRange(min=1), default=2, show_default=True, help="Teachers in the pool.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Images per step.")
@address_option
@click.pass_context
def demo(
    context: click.Context,
    out: Path,
    images: Path | None,
    trained: bool,
    root: str | None,
    revision: str | None,
    steps: int,
    seconds: float,
    replicas: int,
    batch: int,
    address: str | None,
) -> None:
    """Train a small student with a pool of teachers, in about a minute.

    Without options it needs no files and no network: it draws its pictures, and its teacher has random weights.
    """
    interrupts = Interrupts("interrupted: the pool and the Ray that was started for it have ended")
    try:
        with interrupts:
            with interrupts.at_once():
                # Here, since torch and Ray take seconds to import, and Ctrl-C must work then too.
                from dinov3_ray.demo.demonstration import DemoSettings, run_demo
                from dinov3_ray.demo.report import LOSS_FILE, MAPS_FILE, SUMMARY_FILE
                from dinov3_ray.distillation.display import Display

            settings = DemoSettings(out, images, root, revision, steps, seconds, replicas, batch, address, trained)
            summary = run_demo(settings, Display(), interrupts)
    except KeyboardInterrupt:
        click.echo(interrupts.last_words, err=True)
        context.exit(interrupts.exit_code)
    steps = len(summary.losses)  # fewer than --steps if the time was up
    click.echo(f"loss      {summary.first_loss:.3f} -> {summary.last_loss:.3f} (1 - cosine, {steps} steps of {batch})")
    if summary.probe_before is not None:
        scores = f"{summary.probe_before:.1%} -> {summary.probe_after:.1%}"
        click.echo(f"probe     {scores} (mIoU of a linear probe on the student's map, on scenes that it never saw)")
    click.echo(f"speed     {summary.images_per_second:.1f} img/s, {summary.total_seconds:.0f} s in total")
    click.echo(f"waiting   {summary.wait_share:.0%} of the training's time for the teacher")
    click.echo(f"files     {', '.join(str(out / name) for name in (MAPS_FILE, LOSS_FILE, SUMMARY_FILE))}")
