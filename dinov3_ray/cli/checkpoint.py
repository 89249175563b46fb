"""The commands ``dinov3-ray checkpoint``, which make, convert, check and describe model directories.

What reads and writes weights is imported when a command runs, so that the help answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dinov3_ray.cli.teacher_options import image_size_option
from dinov3_ray.cli.values import Bytes, ImageSize
from dinov3_ray.config import ModelConfig, open_config
from dinov3_ray.config.architecture import TransformersArchitecture, ViTArchitecture
from dinov3_ray.config.preprocessing import Preprocessing, Size, ViewSize
from dinov3_ray.config.variants import STATISTICS, VARIANTS, find_variant, variant_of
from dinov3_ray.config.weights import WeightFiles

if TYPE_CHECKING:
    from dinov3_ray.checkpoint.verify import Progress as Report

__all__ = ["checkpoint"]


_image_size = click.option(
    "--image-size",
    type=ImageSize(),
    default="224",
    show_default=True,
    help="The model's input size, as written to the directory: 512, or 384x640 (height x width).",
)
_shard_size = click.option(
    "--shard-size",
    type=Bytes(),
    default="5GB",
    show_default=True,
    help="The largest size of one weight file, such as 500MB or 5GB.",
)
_model = click.argument("directory", type=click.Path())
_revision = click.option("--revision", help="With a hub id: a branch, a tag or a commit. [default: main]")


@click.group()
def checkpoint() -> None:
    """Make, convert, check and describe model directories."""


@checkpoint.command("init")
@click.argument("variant")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--seed", type=int, default=0, show_default=True, help="The seed of the random weights.")
@_image_size
@_shard_size
def init_command(variant: str, directory: Path, seed: int, image_size: tuple[int, int], shard_size: int) -> None:
    """Write a checkpoint of VARIANT with random weights to DIRECTORY.

    VARIANT is vits16, vits16plus, vitb16, vitl16, vith16plus, vit7b16, convnext-tiny, -small, -base or -large, in any
    usual spelling; or, for tests, vit-test, vit-test-gated or convnext-test.
    """
    from dinov3_ray.checkpoint import init_checkpoint

    name = find_variant(variant)
    with _progress(f"writing {name}", 4 * VARIANTS[name].num_parameters) as report:
        init_checkpoint(name, directory, seed=seed, image_size=image_size, shard_bytes=shard_size, progress=report)
    click.echo(f"{directory}: {name}, random weights of seed {seed}")


@checkpoint.command("convert")
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--statistics",
    type=click.Choice(["auto", *STATISTICS]),
    default="auto",
    show_default=True,
    help="The channel mean and std to write: those of LVD-1689M (ImageNet's) or SAT-493M; auto: what comes with "
    "SOURCE, or its name says.",
)
@click.option(
    "--image-size",
    type=ImageSize(),
    help="The model's input size, as written to DIRECTORY: 512, or 384x640 (height x width).  [default: what comes "
    "with SOURCE, or 224]",
)
@click.option("--backbone", help="Which backbone of a training checkpoint to take, such as student.backbone.")
@_shard_size
def convert_command(
    source: Path,
    directory: Path,
    statistics: str,
    image_size: tuple[int, int] | None,
    backbone: str | None,
    shard_size: int,
) -> None:
    """Convert SOURCE to a model directory.

    SOURCE is Meta's, timm's or LightlyTrain's file, a training checkpoint with a DINOv3 in it, a pytorch_model.bin, or
    a folder of timm's with config.json.
    """
    from dinov3_ray.checkpoint import convert_checkpoint

    files = [source] if source.is_file() else [entry for entry in source.iterdir() if entry.is_file()]
    nbytes = 2 * sum(file.stat().st_size for file in files)  # hashed, and written
    with _progress(f"converting {source.name}", nbytes) as report:
        made = convert_checkpoint(
            source,
            directory,
            statistics=statistics,
            image_size=image_size,
            backbone=backbone,
            shard_bytes=shard_size,
            progress=report,
        )
    click.echo(f"{directory}: {made.variant or 'unnamed variant'}, statistics of {made.statistics}")
    for note in made.notes:
        click.echo(f"note: {note}", err=True)


@checkpoint.command("verify")
@_model
@_revision
def verify_command(directory: str, revision: str | None) -> None:
    """Check every file and every weight of DIRECTORY, a model directory or a hub id."""
    from dinov3_ray.checkpoint import verify

    config = open_config(directory, revision=revision)
    weights = verify(config)
    with _progress("reading weights", weights.nbytes) as report:
        verify(config, values=True, progress=report)
    where = config.place.origin if config.hub_id else directory
    click.echo(f"{where}: sound; {len(weights.tensors)} tensors in {len(weights.files)} file(s)")


@checkpoint.command("info")
@_model
@_revision
@image_size_option
def info_command(directory: str, revision: str | None, image_size: Size | ViewSize | None) -> None:
    """Describe the model in DIRECTORY, a model directory or a hub id."""
    from rich.console import Console
    from rich.table import Table

    from dinov3_ray.checkpoint import fingerprint, verify

    config = open_config(directory, revision=revision, image_size=image_size)
    weights = verify(config)
    with _progress("fingerprinting", weights.nbytes) as report:
        digest = fingerprint(config, progress=report)
    table = Table(show_header=False, title=config.place.origin, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a path or an address that is cut is of no use
    for name, value in _facts(config, weights, digest):
        table.add_row(name, value)
    Console().print(table)


def _facts(config: ModelConfig, weights: WeightFiles, digest: str) -> Iterator[tuple[str, str]]:
    architecture = config.architecture
    if isinstance(architecture, TransformersArchitecture):
        yield "variant", f"transformers' {config.family}"
    else:
        yield "variant", variant_of(architecture) or f"none published ({config.family})"
    numbers = sum(math.prod(shape) for shape in weights.shapes.values())  # of a text tower too
    yield "parameters", f"{numbers / 1e6:,.2f} M"
    yield "hidden size", str(config.hidden_size)
    if isinstance(architecture, TransformersArchitecture):
        yield "blocks", str(architecture.num_layers)
        yield "registers", str(config.num_register_tokens)
        yield "patch size", str(config.patch_size)
    elif isinstance(architecture, ViTArchitecture):
        yield "blocks", str(architecture.num_layers)
        yield "heads", f"{architecture.num_heads} of {architecture.hidden_size // architecture.num_heads}"
        yield "MLP", f"{architecture.intermediate_size}, {'SwiGLU' if architecture.gated_mlp else 'plain'}"
        yield "registers", str(config.num_register_tokens)
        yield "patch size", str(config.patch_size)
    else:
        yield "stages", ", ".join(map(str, architecture.depths))
        yield "stage widths", ", ".join(map(str, architecture.hidden_sizes))
        yield "stride", str(config.patch_size)
    follows, note = config.preprocessing.follows, ""
    if follows is not None:
        note = f" where no image is there; else by the images ({follows})"
    yield "input size", f"{_size(config.nominal_size)}{note}"
    yield "map size", f"{_size(config.grid_size)}{note}"
    yield "preprocessing", _describe_preprocessing(config.preprocessing)
    dtypes = sorted({tensor.dtype for tensor in weights.tensors.values()})
    yield "weights", f"{weights.nbytes / 1e9:,.3f} GB of {', '.join(dtypes)}"
    yield "files", ", ".join(path.name for path in weights.files)
    yield "licence", config.license
    yield "fingerprint", digest


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} (h x w)"


def _describe_preprocessing(preprocessing: Preprocessing) -> str:
    """The steps in one line."""
    steps = []
    if preprocessing.size is not None:
        steps.append(f"resize to {_size(preprocessing.size)}")
    if preprocessing.shortest_edge is not None:
        steps.append(f"resize the shorter side to {preprocessing.shortest_edge}")
    if preprocessing.follows == "input/2":
        steps.append(f"resize to half the size, down to multiples of {preprocessing.multiple} px")
    if preprocessing.resample != "bilinear":
        steps = [f"{step}, {preprocessing.resample}" for step in steps]
    if preprocessing.crop_size is not None:
        steps.append(f"crop the centre {_size(preprocessing.crop_size)}")
    if preprocessing.follows == "input":
        steps.append(f"cut to multiples of {preprocessing.multiple} px")
    steps.insert(0 if preprocessing.rescales_first else len(steps), f"x {preprocessing.rescale_factor:.6g}")
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    return "; ".join([*steps, f"mean {mean}; std {std}"])


@contextmanager
def _progress(what: str, total: int) -> Iterator[Report]:
    """Show a progress bar on standard error until the block ends; without a terminal, show nothing.

    Yields:
        The function to call with the number of bytes done since its last call.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
