"""The commands ``dinov3-ray bench``; each imports its measurement when it runs, so that the help answers at once."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from dinov3_ray.bench.gpu.budget import PARTS, TOTAL_SECONDS, wanted_parts
from dinov3_ray.bench.printout import describe_machine
from dinov3_ray.cli.teacher_options import computing_options, model_options
from dinov3_ray.cli.values import Command, ImageSize, InputSize, address_option
from dinov3_ray.config.preprocessing import Size, ViewSize
from dinov3_ray.interrupts import Interrupts

if TYPE_CHECKING:
    from rich.console import RenderableType


__all__ = ["bench"]


class _Result(Protocol):
    """The result of a measurement, which can be shown as JSON and as tables."""

    def as_dict(self) -> dict[str, Any]: ...

    def tables(self) -> Sequence[RenderableType]: ...


def _show(result: _Result, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result.as_dict(), indent=2))
    else:
        from rich.console import Console  # here, so that --help answers at once

        Console().print(*result.tables())


@contextmanager
def _without_warnings() -> Iterator[None]:
    """For measurements whose streams only wait for their teacher: each would warn of it."""
    logger = logging.getLogger("dinov3_ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _repeats(default: int, what: str = "Runs that count.") -> Callable[[Command], Command]:
    return click.option("--repeats", default=default, show_default=True, type=click.IntRange(1), help=what)


def _quick(what: str) -> Callable[[Command], Command]:
    return click.option("--quick", is_flag=True, help=f"{what}, to see that it works.")


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
@address_option
@_as_json
def pool(replicas: int, batches: int, repeats: int, quick: bool, address: str | None, as_json: bool) -> None:
    """What share of its accelerators' speed a pool delivers, compared with ActorPool, Serve and Ray Data.

    The accelerators are simulated: they wait 40 ms per 32 images and return maps of a ViT-L/16 at 224 px. The rest to
    100% is the cost of moving and scheduling the work on this machine.
    """
    from dinov3_ray.bench.own_ray import running
    from dinov3_ray.bench.simulated import Work
    from dinov3_ray.bench.throughput import measure_throughput

    work = Work(batches=max(1, batches // 5) if quick else batches, replicas=replicas)
    with running(address) as step:
        result = measure_throughput(work, 1 if quick else repeats, step)
    _show(result, as_json=as_json)


@bench.command(short_help="One teacher, compared with transformers; sizes a pool.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
@model_options("Your own model")
@click.option("--variant", default="vitb16", show_default=True, help="Without --root: random weights of this variant.")
@click.option(
    "--image-size",
    type=InputSize(),
    default="512",
    show_default=True,
    help="The model's input size, in px; input: that of the images; input/2: half of it.",
)
@click.option(
    "--view",
    type=ImageSize(),
    help="The size of the images. [default: a fifth larger than --image-size; 512 where that follows them]",
)
@click.option("--batch", type=click.IntRange(1), help="Images per batch. [default: 4 on a CPU, else 32]")
@_repeats(5)
@click.option("--target-rate", type=_positive, help="The images per second to size a pool for.")
@_quick("One run, nothing compiled")
@_as_json
def teacher(
    device: str,
    root: str | None,
    revision: str | None,
    variant: str,
    image_size: Size | ViewSize,
    view: Size | None,
    batch: int | None,
    repeats: int,
    target_rate: float | None,
    quick: bool,
    as_json: bool,
) -> None:
    """How fast one teacher computes, compared with transformers and with this device's own bound; sizes a pool.

    Each batch starts as uint8 images in the host's memory and ends as CLS tokens and maps on the device. Rows named "to
    the host" end in the host's memory, through a replica's pipeline. Resizing and normalising are part of the work.
    """
    from rich.console import Console

    from dinov3_ray.bench.teacher_modes import TeacherWork, modes_for, without_emulation
    from dinov3_ray.bench.teacher_speed import Effort, TeacherBench, measure_teacher
    from dinov3_ray.checkpoint import find_variant, init_checkpoint, variant_of
    from dinov3_ray.config import DinoV3Config
    from dinov3_ray.model.device import as_device

    where = as_device(device)
    if isinstance(image_size, str):
        view = view or (512, 512)
    batch = batch or (4 if where.type == "cpu" else 32)

    def run(path: str | Path) -> TeacherBench:
        config = DinoV3Config(path, revision=revision, image_size=image_size)
        name = variant_of(config.architecture) or str(path)
        with Console(stderr=True).status("starting") as status:
            return measure_teacher(
                TeacherWork(config, where, batch, view),
                without_emulation(modes_for(where, quick=quick), where),
                Effort(1, 0.0) if quick else Effort(repeats),
                model=name,
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
    help="Replicas of the pool; repeat it for several pools, one after the other.",
)
@click.option("--steps", default=40, show_default=True, type=click.IntRange(2), help="Steps per pass over the loader.")
@_repeats(3, "Passes that count.")
@click.option("--step-seconds", default=0.3, show_default=True, type=_positive, help="The student's, for 32 images.")
@click.option(
    "--capacity",
    default=1.5,
    show_default=True,
    type=_positive,
    help="The rate of the whole pool, as a multiple of what the student needs.",
)
@_quick("A fourth of the steps, one pass")
@address_option
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

    Student and teachers are simulated: devices that are busy for a given time and compute nothing. Prefetched targets
    are compared with a teacher in the loop that takes as long as the student, and with a batch that is submitted and
    awaited within its step. The first batch of an epoch cannot be prefetched. The wait for it is the fill, which is
    reported by itself and as part of an epoch.
    """
    from dinov3_ray.bench.own_ray import running
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
@click.option("--images", default=768, show_default=True, type=click.IntRange(64), help="Per run; peers get a quarter.")
@click.option("--variant", default="vits16", show_default=True, help="The teacher's variant, with random weights.")
@computing_options(dtype="--compute-dtype", image_size=False)
@_repeats(3)
@_quick("64 images, one run, a tiny teacher")
@address_option
@_as_json
def dataset(
    images: int,
    variant: str,
    computing: dict[str, Any],
    repeats: int,
    quick: bool,
    address: str | None,
    as_json: bool,
) -> None:
    """How fast extract runs, compared with a bare loop over its teacher and plain Ray Data; and how fast a store is
    read, beside Lance and Hugging Face's datasets where they are installed.

    The options that say how to compute are those of extract and the bare loop; plain transformers runs in float32, its
    default.
    """
    from dinov3_ray.bench.dataset.extracting import DatasetWork, measure_dataset
    from dinov3_ray.bench.own_ray import running

    work = DatasetWork(images=images, variant=variant, **computing)
    if quick:
        work, repeats = replace(work, images=64, variant="vit-test"), 1
    with tempfile.TemporaryDirectory(prefix="dinov3-ray-bench-") as folder, running(address) as step:
        result = measure_dataset(work, repeats, Path(folder), step, quick=quick)
    _show(result, as_json=as_json)


@bench.command(short_help="Costs as work grows, compared with what a model predicts.")
@click.option("--seconds", type=click.FloatRange(0.1), help="Seconds per point. [default: 3, with --quick 1]")
@click.option(
    "--network",
    default=25.0,
    show_default=True,
    type=_positive,
    help="Gbit/s of a client on another node.",
)
@_quick("Few points, up to 4 replicas and 2 clients")
@address_option
@_as_json
def scaling(seconds: float | None, network: float, quick: bool, address: str | None, as_json: bool) -> None:
    """What a pool costs as replicas, images per batch, sizes of maps and clients grow, and which part limits it.

    Accelerators are simulated: they wait 40 ms per 32 images. The cost of a batch is measured with one replica and two
    sizes of batches. A small model predicts all other points from it, and these are measured too. Nothing is sent at
    the rate of --network: it only enters the calculation for clients on other nodes. All points take about four
    minutes; 16 client processes and 32 replicas take about 10 GiB of memory.
    """
    from dinov3_ray.bench.own_ray import running
    from dinov3_ray.bench.scaling import QUICK, ScalingPlan, measure_scaling

    plan = replace(QUICK if quick else ScalingPlan(), network=network * 1e9 / 8)
    if seconds is not None:
        plan = replace(plan, seconds=seconds)
    with _without_warnings(), running(address, store_bytes=4 * 2**30) as step:
        result = measure_scaling(plan, step)
    _show(result, as_json=as_json)


@bench.command(short_help="One result's way to the client, compared with plain actors.")
@_repeats(50, "Results that count.")
@_quick("A tenth of the results")
@address_option
@_as_json
def transport(repeats: int, quick: bool, address: str | None, as_json: bool) -> None:
    """How fast one result reaches the client.

    A map [32, 1024, 14, 14] is compared with plain actors that return it as a NumPy array and as a torch tensor. The
    CLS token of one image is compared with an async actor's method that does nothing.
    """
    from dinov3_ray.bench.own_ray import running
    from dinov3_ray.bench.round_trip import measure_round_trips
    from dinov3_ray.bench.simulated import Work

    with running(address) as step:
        step("results")
        result = measure_round_trips(Work(seconds=0.0, pixels=16), max(1, repeats // 10) if quick else repeats)
    _show(result, as_json=as_json)


@bench.command(short_help="The choice of a replica, in pools of 1 to 10,000.")
@click.option("--requests", default=20_000, show_default=True, type=click.IntRange(1), help="Requests per run.")
@_repeats(5)
@_quick("A tenth of the requests, one run")
@_as_json
def router(requests: int, repeats: int, quick: bool, as_json: bool) -> None:
    """How long the choice of a replica takes, in pools of 1 to 10,000 replicas. Needs no Ray."""
    from dinov3_ray.bench.routing import measure_routing

    result = measure_routing(max(1, requests // 10), 1) if quick else measure_routing(requests, repeats)
    _show(result, as_json=as_json)


@bench.command(short_help="Proof that a student gains from a teacher that knows something.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder for pictures: gains.png and predictions.png. [default: none]",
)
@click.option("--seeds", type=click.IntRange(2, 31), help="Paired runs of each arm. [default: 5, with --quick 3]")
@click.option("--replicas", default=1, show_default=True, type=click.IntRange(1), help="Teachers in each pool.")
@click.option("--local", is_flag=True, help="Pools in this process, without Ray.")
@_quick("A small teacher, few scenes and steps")
@address_option
@_as_json
@click.pass_context
def distillation(
    context: click.Context,
    out: Path | None,
    seeds: int | None,
    replicas: int,
    local: bool,
    quick: bool,
    address: str | None,
    as_json: bool,
) -> None:
    """Whether a student with 32 labels gets better by distilling, on drawn scenes that come with labels.

    Arms with the same labelled steps, paired by seed: the labels alone; after distilling from a random teacher, from a
    trained one on 3,000 scenes without labels, or from its maps of other images; and with both at once. The teacher is
    a small ViT, made once and kept in the cache folder. The exit code is 1 if the lower 95% bound of the gain over
    labels alone, or over either control, is not above 0, or if maps of other images bring a gain.
    """
    from dinov3_ray.bench.own_ray import running
    from dinov3_ray.bench.proof.arms import QUICK_PROOF, ProofSettings
    from dinov3_ray.bench.proof.measuring import measure_proof
    from dinov3_ray.pictures import make_out_folder

    settings = replace(QUICK_PROOF if quick else ProofSettings(), replicas=replicas)
    settings = settings if seeds is None else replace(settings, seeds=seeds)
    if out is not None:
        make_out_folder(out)
    begun = datetime.now(UTC)

    def note(step: str) -> None:
        click.echo(f"{(datetime.now(UTC) - begun).total_seconds():5.0f} s  {step}", err=True)

    interrupts = Interrupts("interrupted: the pools and the Ray that was started for them have ended")
    try:
        with interrupts, _without_warnings(), tempfile.TemporaryDirectory(prefix="dinov3-ray-bench-") as folder:
            proof = measure_proof(settings, Path(folder), None if local else lambda: running(address), note)
    except KeyboardInterrupt:
        click.echo(interrupts.last_words, err=True)
        context.exit(interrupts.exit_code)
    _show(proof, as_json=as_json)
    if out is not None:
        for picture in proof.save_pictures(out):
            click.echo(f"written: {picture}", err=True)
    for complaint in proof.complaints():
        click.echo(complaint, err=True)
    context.exit(bool(proof.complaints()))


@bench.command(short_help="All that only a GPU can show, in nine minutes.")
@click.option(
    "--json",
    "out",
    metavar="OUT",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file for all that was measured; it is written after each row, so that a run that is cut loses nothing.",
)
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:1, cpu ...")
@click.option(
    "--part",
    "names",
    multiple=True,
    type=click.Choice([part.name for part in PARTS]),
    help="Only this part, with the whole time; repeat it for several. [default: all]",
)
@click.option("--seconds", default=TOTAL_SECONDS, show_default=True, type=_positive, help="The time of all parts.")
@_quick("A tiny teacher and small images")
@address_option
@click.pass_context
def gpu(
    context: click.Context,
    out: Path | None,
    device: str,
    names: tuple[str, ...],
    seconds: float,
    quick: bool,
    address: str | None,
) -> None:
    """All that only a GPU can show, within nine minutes: tables in Markdown, and a JSON of all that was measured.

    Teachers of random weights are compared with transformers and with the rate that this GPU's own matrix products
    allow; a pool and an extraction with bare loops; a training step with one that has no teacher. The tests that need a
    GPU run, and torch's CUDA sanitizer looks for races. Each part has a share of the time, and begins nothing new after
    it; what was left out is named. The exit code is 1 if a part failed. Figures that were asked for and not reached do
    not change it.
    """
    from dinov3_ray.bench.gpu.journal import Journal
    from dinov3_ray.bench.gpu.supervisor import run_parts, worker_command

    parts = wanted_parts(names)
    begun = datetime.now(UTC)
    command = " ".join(["dinov3-ray", *sys.argv[1:]])
    journal = Journal.of(parts, out, command=command, machine=describe_machine(), begun=begun.isoformat("T", "seconds"))
    journal.header["counts"] = device.startswith("cuda") and not quick
    journal.write()  # before the time is spent: the file may be one that cannot be written

    def note(step: str) -> None:
        click.echo(f"{(datetime.now(UTC) - begun).total_seconds():5.0f} s  {step}", err=True)

    interrupts = Interrupts("interrupted")
    folder = tempfile.TemporaryDirectory(prefix="dinov3-ray-bench-", ignore_cleanup_errors=True)
    try:
        with interrupts, folder:
            setting = {"device": device, "quick": quick, "folder": folder.name, "address": address}
            run_parts(parts, journal, worker_command(json.dumps(setting)), seconds, note)
    except KeyboardInterrupt:
        click.echo("interrupted: what was measured until then follows", err=True)
    journal.header["ended"] = datetime.now(UTC).isoformat("T", "seconds")
    journal.write()
    click.echo(journal.markdown())
    context.exit(interrupts.exit_code or int(journal.failed))
