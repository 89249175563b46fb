"""The command ``dinov3-ray distill``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinov3_ray.cli.teacher_options import model_options
from dinov3_ray.cli.values import ImageSize, Replicas, address_option
from dinov3_ray.errors import PoolError
from dinov3_ray.interrupts import Interrupts
from dinov3_ray.pool.address import NAMESPACE

if TYPE_CHECKING:
    from dinov3_ray.distillation.job import DistillSummary

__all__ = ["distill"]


_MISSING = {
    "before": "not scored: --evaluate was not given when the run began",
    "after": "not scored: --evaluate was not given when the run ended (the same command with it scores this)",
    "teacher": "not scored",
}


@click.command("distill")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--student",
    required=True,
    help="timm:NAME, or NAME where timm is installed; transformers:TYPE, or a directory with config.json; a .yaml of "
    "Ultralytics; or module:function, which returns an nn.Module.",
)
@model_options()
@click.option("--pool", help="The name of a running pool, instead of --root.")
@click.option("--namespace", default=NAMESPACE, show_default=True, help="The pool's Ray namespace.")
@click.option("--recipe", default="lightly", show_default=True, help="The recipe by its name.")
@click.option(
    "--layer",
    "layers",
    multiple=True,
    help="A layer of the student to compare with the teacher; may be repeated. [default: what the recipe takes]",
)
@click.option(
    "--pretrained", is_flag=True, help="Begin with the student's published weights, or those in its directory."
)
@click.option(
    "--normalize",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "imagenet", "none"]),
    help="The mean and std of the student's pixels; none: they stay in 0..1. auto: the framework's own.",
)
@click.option("--epochs", type=click.IntRange(1), help="Passes over the images. [default: 100]")
@click.option("--steps", type=click.IntRange(1), help="Steps, instead of --epochs.")
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Images per step.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="The highest learning rate.")
@click.option("--weight-decay", type=float, default=0.05, show_default=True, help="AdamW's.")
@click.option(
    "--image-size", type=ImageSize(), default="224", show_default=True, help="The views' size: 224, or 384x640."
)
@click.option(
    "--amp",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "off", "bfloat16", "float16"]),
    help="The student's autocast. auto: on a GPU.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the student's weights and of the views."
)
@click.option("--device", default="auto", show_default=True, help="The student's. auto: the last GPU, or else the CPU.")
@click.option(
    "--replicas",
    type=Replicas(auto=True),
    default="auto",
    show_default=True,
    help="With --root: teachers. auto: one per free GPU.",
)
@click.option("--workers", type=click.IntRange(0), help="Processes that decode. [default: half of the CPUs, at most 8]")
@click.option("--save-every", type=click.IntRange(1), default=200, show_default=True, help="Steps between checkpoints.")
@click.option("--evaluate", metavar="DIR", help="A folder with a folder of images for each class.")
@address_option
@click.pass_context
def distill(context: click.Context, /, **options: Any) -> None:
    """Distil a student backbone on the images in SOURCE, which need no labels; the same command resumes it.

    SOURCE is a folder, file, glob or URI of images, or of WebDataset shards (.tar). OUT is the folder of the run: its
    checkpoint, its metrics, and at the end the student's weights, in the student's own format.
    """
    interrupts = Interrupts(f"interrupted: the same command continues from the last checkpoint in {options['out']}")
    try:
        with interrupts:
            with interrupts.at_once():
                # Here, since torch and Ray take seconds to import, and Ctrl-C must work then too.
                import ray

                from dinov3_ray.distillation.display import Display
                from dinov3_ray.distillation.job import DistillSettings, distill_backbone

            settings = DistillSettings(**options)
            named = settings.address or os.environ.get("RAY_ADDRESS") or ray.is_initialized()
            if settings.pool is not None and not named:
                raise PoolError(
                    f"pool {settings.pool!r} is in a Ray that is not named: pass --address HOST:PORT or set "
                    "RAY_ADDRESS (or give --root instead of --pool, which starts a teacher for this run)"
                )
            summary = distill_backbone(settings, Display(), interrupts)
    except KeyboardInterrupt:
        click.echo(interrupts.last_words, err=True)
        context.exit(interrupts.exit_code)
    _show(summary)


def _show(summary: DistillSummary) -> None:
    first = f"{summary.first_loss:.4f} -> " if summary.steps > 1 else ""
    steps = "1 step" if summary.steps == 1 else f"{summary.steps} steps"
    click.echo(f"loss      {first}{summary.last_loss:.4f} ({steps} of {summary.batch})")
    if summary.scores:
        click.echo(f"{'':10}{'20 neighbours':>14}{'linear probe':>14}")
        for which in ("before", "after", "teacher"):
            if scores := summary.scores.get(which):
                click.echo(f"{which:10}{scores['knn']:>14.1%}{scores['linear']:>14.1%}")
            else:
                click.echo(f"{which:10}{_MISSING[which]}")
    if summary.unreadable:
        click.echo(f"not read  {len(summary.unreadable):,} of {summary.images:,} images: see summary.json")
    click.echo(f"weights   {summary.weights}")
    click.echo(f"use       {summary.usage}")
