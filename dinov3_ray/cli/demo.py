"""``dinov3-ray demo``."""

from __future__ import annotations

from pathlib import Path

import click

from dinov3_ray.interrupts import Interrupts

__all__ = ["demo"]


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("dinov3-demo"),
    show_default=True,
    help="Where the loss curve, the pictures and summary.json go.",
)
@click.option(
    "--images", type=click.Path(path_type=Path), help="A folder of your own photographs, in place of drawn scenes."
)
@click.option(
    "--root", type=click.Path(path_type=Path), help="Your own teacher's model directory, in place of random weights."
)
@click.option("--steps", type=click.IntRange(min=2), default=150, show_default=True, help="Of training.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=40.0,
    show_default=True,
    help="Of training, at most: a slow machine does fewer steps.",
)
@click.option("--replicas", type=click.IntRange(min=1), default=2, show_default=True, help="Teachers in the pool.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Views a step.")
@click.option(
    "--address", help="host:port of a running Ray to join; without it and RAY_ADDRESS, Ray is started for this run."
)
@click.pass_context
def demo(
    context: click.Context,
    out: Path,
    images: Path | None,
    root: Path | None,
    steps: int,
    seconds: float,
    replicas: int,
    batch: int,
    address: str | None,
) -> None:
    """Teach a small student with a pool of teachers, in about a minute.

    Without options it needs no files and no network: it draws its pictures and makes up its teacher's weights.
    """
    interrupts = Interrupts("interrupted: the pool and what was started for it are gone")
    try:
        with interrupts:
            with interrupts.at_once():
                # Here, since torch and Ray take seconds to import, in which Ctrl-C is to work too.
                from dinov3_ray.demo.demonstration import Settings, run
                from dinov3_ray.demo.report import LOSS_FILE, MAPS_FILE, SUMMARY_FILE, Display

            settings = Settings(out, images, root, steps, seconds, replicas, batch, address)
            summary = run(settings, Display(), interrupts)
    except KeyboardInterrupt:
        click.echo(interrupts.last_words, err=True)
        context.exit(interrupts.exit_code)
    steps = len(summary.losses)  # fewer than asked for, if the time was up
    click.echo(f"loss      {summary.first_loss:.3f} -> {summary.last_loss:.3f} (1 - cosine, {steps} steps of {batch})")
    click.echo(f"speed     {summary.images_per_second:.1f} img/s, {summary.total_seconds:.0f} s in all")
    click.echo(f"waiting   {summary.wait_share:.0%} of the training's time for the teacher")
    click.echo(f"files     {', '.join(str(out / name) for name in (MAPS_FILE, LOSS_FILE, SUMMARY_FILE))}")
