"""The commands ``dinov3-ray bench``: each loads its measurement as it runs, so that the others cost it nothing."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from dinov3_ray.cli.values import Command, ImageSize

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["bench"]


class _Result(Protocol):
    """What a measurement returns: itself as JSON, and as tables for people."""

    def as_dict(self) -> dict[str, Any]: ...

    def tables(self) -> Sequence[RenderableType]: ...


def _show(result: _Result, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result.as_dict(), indent=2))
    else:
        from rich.console import Console  # here, so that --help answers at once

        Console().print(*result.tables())


def _repeats(default: int, what: str = "Runs that count.") -> Callable[[Command], Command]:
    return click.option("--repeats", default=default, show_default=True, type=click.IntRange(1), help=what)


def _quick(what: str) -> Callable[[Command], Command]:
    return click.option("--quick", is_flag=True, help=f"{what}: to see that it works.")


_address = click.option("--address", help="HOST:PORT of a running Ray. [default: RAY_ADDRESS, or a Ray of this run]")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
_positive = click.FloatRange(0, min_open=True)


@click.group()
def bench() -> None:
    """Measure, and compare with peers that do the same work in the same run.

    Without --address or RAY_ADDRESS, a command that needs Ray starts one. Run nothing else on the machine meanwhile.
    """


@bench.command(short_help="A pool's throughput, compared with ActorPool, Serve and Ray Data.")
@click.option("--replicas", default=4, show_default=True, type=click.IntRange(1), help="Simulated accelerators.")
@click.option("--batches", default=100, show_default=True, type=click.IntRange(1), help="Batches in each run.")
@_repeats(3)
@_quick("A fifth of the batches, one run")
@_address
@_as_json
def pool(replicas: int, batches: int, repeats: int, quick: bool, address: str | None, as_json: bool) -> None:
    """What share of its accelerators' speed a pool delivers, compared with ActorPool, Serve and Ray Data.

    The accelerators are simulated: they wait 40 ms for 32 images and return maps of a ViT-L/16 at 224 px. What is
    missing to 100% is the cost of moving and steering the work on this machine.
    """
    from dinov3_ray.bench.machine import running
    from dinov3_ray.bench.simulated import Work
    from dinov3_ray.bench.throughput import measure_throughput

    work = Work(batches=max(1, batches // 5) if quick else batches, replicas=replicas)
    with running(address) as step:
        result = measure_throughput(work, 1 if quick else repeats, step)
    _show(result, as_json=as_json)


@bench.command(short_help="One teacher, compared with transformers; sizes a pool.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option("--root", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A checkpoint of your own.")
@click.option("--variant", default="vitb16", show_default=True, help="Random weights of this variant, without --root.")
@click.option("--image-size", type=ImageSize(), default="512", show_default=True, help="The model's input, in px.")
@click.option("--batch", type=click.IntRange(1), help="Images per batch. [default: 4 on a CPU, else 32]")
@_repeats(5)
@click.option("--target-rate", type=_positive, help="img/s to size a pool for.")
@_quick("One run, nothing compiled")
@_as_json
def teacher(
    device: str,
    root: Path | None,
    variant: str,
    image_size: tuple[int, int],
    batch: int | None,
    repeats: int,
    target_rate: float | None,
    quick: bool,
    as_json: bool,
) -> None:
    """How fast one teacher computes, compared with transformers and with this device's own bound; sizes a pool.

    Each batch starts as uint8 images in the host's memory and ends as CLS tokens and maps on the device ("to the host":
    in the host's memory, through a replica's pipeline). Resizing and normalizing is part of the work.
    """
    from rich.console import Console

    from dinov3_ray.bench.teacher_modes import TeacherWork
    from dinov3_ray.bench.teacher_speed import TeacherBench, measure_teacher
    from dinov3_ray.checkpoint import find_variant, init_checkpoint, variant_of
    from dinov3_ray.config import DinoV3Config
    from dinov3_ray.model.device import as_device

    where = as_device(device)
    batch = batch or (4 if where.type == "cpu" else 32)

    def run(path: Path) -> TeacherBench:
        config = DinoV3Config(path, image_size=image_size)
        name = variant_of(config.architecture) or str(path)
        with Console(stderr=True).status("starting") as status:
            return measure_teacher(
                TeacherWork(config, where, batch),
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
    _show(result, as_json=as_json)


@bench.command(short_help="A training step, compared with one without a teacher.")
@click.option(
    "--replicas",
    multiple=True,
    default=(2, 4),
    show_default=True,
    type=click.IntRange(1),
    help="In the pool; may be repeated, for one pool after the other.",
)
@click.option("--steps", default=40, show_default=True, type=click.IntRange(2), help="In a pass over the loader.")
@_repeats(3, "Passes that count.")
@click.option("--step-seconds", default=0.3, show_default=True, type=_positive, help="The student's, for 32 images.")
@click.option(
    "--capacity",
    default=1.5,
    show_default=True,
    type=_positive,
    help="The whole pool's, as a multiple of what the student needs.",
)
@_quick("A fourth of the steps, one pass")
@_address
@_as_json
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
    """How long a training step takes with its teacher in a pool, compared with the same step without a teacher.

    Student and teachers are simulated: devices that are busy for a given time and compute nothing. Targets ahead of the
    loop (prefetch) are compared with a teacher in the loop that takes as long as the student, and with a batch that is
    submitted and waited for within its step. Nothing can be ahead of an epoch's first batch: its wait is the fill,
    reported separately and within an epoch of so many steps.
    """
    from dinov3_ray.bench.machine import running
    from dinov3_ray.bench.training_steps import TrainingSetting, measure_training

    if quick:
        steps, repeats = max(2, steps // 4), 1
    settings = [
        TrainingSetting(replicas=number, steps=steps, repeats=repeats, step_seconds=step_seconds, capacity=capacity)
        for number in replicas
    ]
    with running(address) as step:
        result = measure_training(settings, step)
    _show(result, as_json=as_json)


@bench.command(short_help="Extraction and reading of data sets, compared with Ray Data.")
@click.option("--images", default=768, show_default=True, type=click.IntRange(64), help="In a run; peers get a fourth.")
@click.option("--variant", default="vits16", show_default=True, help="The teacher, with random weights.")
@click.option(
    "--compute-dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="For extract and the bare loop; plain transformers runs in float32, its default.",
)
@_repeats(3)
@_quick("64 images, one run, a tiny teacher")
@_address
@_as_json
def dataset(
    images: int, variant: str, compute_dtype: str, repeats: int, quick: bool, address: str | None, as_json: bool
) -> None:
    """How fast extract runs, compared with a bare loop over its teacher and plain Ray Data; and how fast a store is
    read."""
    from dinov3_ray.bench.dataset import DatasetWork, measure_dataset
    from dinov3_ray.bench.machine import running

    work = DatasetWork(images=images, variant=variant, dtype=compute_dtype)  # type: ignore[arg-type]
    if quick:
        work, repeats = DatasetWork(images=64, variant="vit-test", dtype=work.dtype), 1
    with tempfile.TemporaryDirectory(prefix="dinov3-ray-bench-") as folder, running(address) as step:
        result = measure_dataset(work, repeats, Path(folder), step, quick=quick)
    _show(result, as_json=as_json)


@bench.command(short_help="Costs as work grows, compared with what a model predicts.")
@click.option("--seconds", type=click.FloatRange(0.1), help="That count, of each point. [default: 3; quick: 1]")
@click.option("--network", default=25.0, show_default=True, type=_positive, help="Gbit/s of a client on another node.")
@_quick("Few points, to 4 replicas and 2 clients")
@_address
@_as_json
def scaling(seconds: float | None, network: float, quick: bool, address: str | None, as_json: bool) -> None:
    """What a pool costs as replicas, images per batch, sizes of maps and clients grow; and which part is the limit.

    Accelerators are simulated: they wait 40 ms for 32 images. What batches cost is measured with one replica and two
    sizes of batches; a small model predicts the rest from that, and the rest is measured too. --network is only
    calculated with, for clients on other nodes. All points take about four minutes; 16 client processes and 32 replicas
    take about 10 GiB of memory.
    """
    from dinov3_ray.bench.machine import running
    from dinov3_ray.bench.scaling import QUICK, ScalingPlan, measure_scaling

    plan = replace(QUICK if quick else ScalingPlan(), network=network * 1e9 / 8)
    if seconds is not None:
        plan = replace(plan, seconds=seconds)
    logger = logging.getLogger("dinov3_ray")
    level = logger.level
    logger.setLevel(logging.ERROR)  # each stream would be warned that it waits for its teacher
    try:
        with running(address, store_bytes=4 * 2**30) as step:
            result = measure_scaling(plan, step)
    finally:
        logger.setLevel(level)
    _show(result, as_json=as_json)


@bench.command(short_help="One result's way to the client, compared with plain actors.")
@_repeats(50, "Results that count.")
@_quick("A tenth of the results")
@_address
@_as_json
def transport(repeats: int, quick: bool, address: str | None, as_json: bool) -> None:
    """How fast one result reaches the client.

    A map [32, 1024, 14, 14] is compared with a plain actor that returns the torch tensor; one image's CLS token with a
    bare async actor's method that does nothing.
    """
    from dinov3_ray.bench.machine import running
    from dinov3_ray.bench.round_trip import measure_round_trips
    from dinov3_ray.bench.simulated import Work

    with running(address) as step:
        step("results")
        result = measure_round_trips(Work(seconds=0.0, pixels=16), max(1, repeats // 10) if quick else repeats)
    _show(result, as_json=as_json)


@bench.command(short_help="The choice of a replica, in pools of 1 to 10,000.")
@click.option("--requests", default=20_000, show_default=True, type=click.IntRange(1), help="In a run.")
@_repeats(5)
@_quick("A tenth of the requests, one run")
@_as_json
def router(requests: int, repeats: int, quick: bool, as_json: bool) -> None:
    """How long the choice of a replica takes, in pools of 1 to 10,000 replicas. Needs no Ray."""
    from dinov3_ray.bench.routing import measure_routing

    result = measure_routing(max(1, requests // 10), 1) if quick else measure_routing(requests, repeats)
    _show(result, as_json=as_json)
