"""The commands ``dinov3-ray up | reload``, which give a pool its teacher; Ray and torch are imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from dinov3_ray.cli.pool import pool_options, timeout_option
from dinov3_ray.cli.teacher_options import computing_options, model_options
from dinov3_ray.cli.values import Pair, PoolOption, Replicas
from dinov3_ray.config import open_config
from dinov3_ray.pool.address import NAMESPACE
from dinov3_ray.pool.spec import Batching

__all__ = ["reload", "up"]


_MODEL = "The teacher's model, on every node"


@click.command()
@click.option("--dry-run", is_flag=True, help="With --config: show what would change, and change nothing.")
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A YAML file that declares the pool, instead of the options below. A running pool is changed to match it.",
)
@model_options(_MODEL)
@computing_options()
@click.option("--replicas", type=Replicas(auto=True), default="auto", show_default=True, help="auto: one per free GPU.")
@click.option(
    "--leave-gpus",
    type=float,
    default=0,
    show_default=True,
    help="With --replicas auto: GPUs of the cluster that the pool leaves to others, such as trainers.",
)
@click.option(
    "--num-gpus", type=float, help="GPUs per replica, or a share of one. [default: 1 if the cluster has any, else 0]"
)
@click.option("--num-cpus", type=float, default=0, show_default=True, help="CPUs to reserve per replica.")
@click.option("--label", "labels", multiple=True, type=Pair(), help="A label that nodes must have.")
@click.option(
    "--batching", type=click.Choice(get_args(Batching)), help="How requests share forward passes. [default: exact]"
)
@click.option("--max-batch", type=int, help="The most images per forward pass. [default: 32]")
@click.option(
    "--max-wait", type=float, help="Seconds that a request may wait for others to share its pass. [default: 0.005]"
)
@click.option("--threads", type=int, help="CPU threads per replica. [default: an equal share of the cluster's CPUs]")
@click.option("--set", "others", multiple=True, type=PoolOption(), help="Another pool option.")
@timeout_option
@pool_options
def up(
    name: str,
    address: str | None,
    namespace: str,
    file: Path | None,
    dry_run: bool,
    root: str | None,
    revision: str | None,
    computing: dict[str, Any],
    replicas: Any,
    leave_gpus: float,
    num_gpus: float | None,
    num_cpus: float,
    labels: tuple[tuple[str, str], ...],
    timeout: float,
    others: tuple[tuple[str, Any], ...],
    **options: Any,
) -> None:
    """Start a pool in a running Ray, and leave it running.

    With --config, the pool becomes what the file declares: it is started, changed while it serves, or left as it is.
    """
    if file is not None:
        _refuse_options_of_the_file(click.get_current_context())
        _up_as_declared(file, address, timeout, dry_run=dry_run)
        return
    if dry_run:
        raise click.UsageError("--dry-run needs --config")
    if root is None:
        raise click.UsageError("name the model with --root, or declare the pool in a file: --config")
    from dinov3_ray.cli.session import joined, show_progress
    from dinov3_ray.cli.table import summary
    from dinov3_ray.pool.teacher_pool import TeacherPool

    config = open_config(root, revision=revision, **computing)
    options = {name: value for name, value in options.items() if value is not None} | dict(others)
    with joined(address) as here, show_progress(f"pool {name}") as report:
        pool = TeacherPool.start(
            config,
            name=name,
            namespace=namespace,
            replicas=replicas,
            leave_gpus=leave_gpus,
            lifetime="detached",
            num_gpus=num_gpus,
            num_cpus=num_cpus,
            label_selector=dict(labels),
            timeout=timeout,
            on_status=report,
            **options,
        )
        started = pool.status()
    click.echo(f"pool {name!r} is up: {summary(started)}; teacher {started.fingerprint}")
    elsewhere = "" if namespace == NAMESPACE else f", namespace={namespace!r}"
    click.echo(f"use it with RemoteTeacher({name!r}, address={here!r}{elsewhere})")


def _refuse_options_of_the_file(context: click.Context) -> None:
    for parameter in context.command.get_params(context):
        conflicts = parameter.name not in ("file", "dry_run", "address", "timeout")
        source = context.get_parameter_source(parameter.name or "")
        if conflicts and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} does not go with --config: say it in the file")


def _up_as_declared(file: Path, address: str | None, timeout: float, *, dry_run: bool) -> None:
    from dinov3_ray.cli.session import joined, show_progress
    from dinov3_ray.cli.table import summary
    from dinov3_ray.pool.poolfile import PoolFile
    from dinov3_ray.pool.rollout import plan_rollout

    wanted = PoolFile.read(file)
    with joined(address) as here:
        plan = plan_rollout(wanted, here)
        for change in plan.changes or ():
            click.echo(f"  {change}")
        if plan.changes is None:
            click.echo(f"pool {wanted.name!r} does not run: it {'would be' if dry_run else 'is being'} started")
        elif not plan.changes:
            click.echo(f"pool {wanted.name!r} is as {file} says: nothing to change")
        if dry_run or plan.changes == ():
            return
        with show_progress(f"pool {wanted.name}") as report:
            now = plan.carry_out(timeout, report)
        click.echo(f"pool {wanted.name!r} is as {file} says: {summary(now)}; teacher {now.fingerprint}")


@click.command()
@model_options(_MODEL, required=True)
@computing_options()
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until all replicas have the new teacher.")
@timeout_option
@pool_options
def reload(
    name: str,
    address: str | None,
    namespace: str,
    root: str,
    revision: str | None,
    computing: dict[str, Any],
    wait: bool,
    timeout: float,
) -> None:
    """Replace a pool's teacher, replica by replica, while it serves.

    The options describe the new teacher completely: none is taken from the present one. If it fails to start three
    times in a row, the pool returns to the present one, and the exit status is 1.
    """
    from dinov3_ray.cli.session import joined, show_progress
    from dinov3_ray.cli.table import summary
    from dinov3_ray.pool.teacher_pool import TeacherPool

    config = open_config(root, revision=revision, **computing)
    with joined(address), TeacherPool.connect(name, namespace=namespace) as pool:
        former = pool.status().fingerprint
        if not wait:
            pool.reload(config, wait=False)
            click.echo(f"pool {name!r}: replacing teacher {former}")
            return
        with show_progress(f"pool {name}") as report:
            pool.reload(config, timeout=timeout, on_status=report)
        now = pool.status()
    click.echo(f"pool {name!r}: teacher {former} -> {now.fingerprint}; {summary(now)}")
