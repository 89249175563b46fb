"""``dinov3-ray up | status | scale | reload | down``: a pool's life from the shell."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import ray
from rich.console import Console
from rich.live import Live

from dinov3_ray.checkpoint.commands import parse_image_size
from dinov3_ray.config import ComputeDtype, DinoV3Config
from dinov3_ray.errors import PoolError, PoolNotFoundError
from dinov3_ray.pool.cluster import NAMESPACE, connect
from dinov3_ray.pool.declaring import plan_pool
from dinov3_ray.pool.ledger import Ledger
from dinov3_ray.pool.options import Batching
from dinov3_ray.pool.optionvalues import parse_number, parse_pairs, parse_replicas
from dinov3_ray.pool.poolfile import PoolFile
from dinov3_ray.pool.ray_control import end_replicas
from dinov3_ray.pool.status import PoolStatus
from dinov3_ray.pool.table import is_healthy, rates, render, summary
from dinov3_ray.pool.teacher_pool import TeacherPool

__all__ = ["down", "reload", "scale", "status", "up"]

_DEGRADED = 3  # exit status: fewer replicas ready than wanted
_WIDE = 160  # columns of a table that goes to no terminal

Command = TypeVar("Command", bound=Callable[..., Any])


def _pool_options(command: Command) -> Command:
    """Which pool, and where."""
    for option in (
        click.option("--namespace", default=NAMESPACE, show_default=True, help="Ray namespace that the pool lives in."),
        click.option("--address", metavar="HOST:PORT", help="The Ray to join. [default: RAY_ADDRESS]"),
        click.option("--name", default="dinov3", show_default=True, help="The pool's name."),
    ):
        command = option(command)
    return command


def _teacher_options(command: Command) -> Command:
    """Which teacher, and how it computes."""
    return _root_option(required=True)(_computing_options(command))


def _root_option(*, required: bool) -> Callable[[Command], Command]:
    return click.option(
        "--root",
        type=click.Path(path_type=Path),
        required=required,
        help="The model directory, at the same path on every node.",
    )


def _computing_options(command: Command) -> Command:
    for option in (
        click.option("--attention", default="auto", show_default=True, help="Attention kernel: auto, sdpa, eager ..."),
        click.option("--compile/--no-compile", "compiled", default=False, help="Run it through torch.compile."),
        click.option(
            "--image-size",
            metavar="SIZE",
            callback=lambda *given: None if given[-1] is None else parse_image_size(*given),
            help="Model input: 518, or 384x640 (height x width). [default: the directory's]",
        ),
        click.option(
            "--dtype", type=click.Choice(get_args(ComputeDtype)), default="auto", help="To compute in. [default: auto]"
        ),
    ):
        command = option(command)
    return command


_timeout = click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds to wait at most.")


@click.command()
@click.option("--dry-run", is_flag=True, help="With --config: show what would change, and change nothing.")
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The pool declared in a YAML file, in place of the options below; a pool that runs is changed to it.",
)
@_root_option(required=False)
@_computing_options
@click.option("--replicas", callback=parse_replicas, default="auto", show_default=True, metavar="N|MIN-MAX|auto")
@click.option("--num-gpus", type=float, help="GPUs a replica. [default: 1 where the cluster has any, else 0]")
@click.option("--num-cpus", type=float, default=0, show_default=True, help="CPUs that each replica reserves.")
@click.option(
    "--label", "labels", multiple=True, callback=parse_pairs, metavar="KEY=VALUE", help="Label that nodes must have."
)
@click.option("--batching", type=click.Choice(get_args(Batching)), help="How requests share passes. [default: exact]")
@click.option("--max-batch", type=int, help="Most images in one forward pass. [default: 32]")
@click.option("--max-wait", type=float, help="Seconds that a request may wait for company. [default: 0.005]")
@click.option("--threads", type=int, help="CPU threads a replica. [default: the cluster's CPUs, shared out]")
@click.option("--set", "others", multiple=True, callback=parse_pairs, metavar="NAME=VALUE", help="Another pool option.")
@_timeout
@_pool_options
def up(
    name: str,
    address: str | None,
    namespace: str,
    file: Path | None,
    dry_run: bool,
    root: Path | None,
    dtype: ComputeDtype,
    image_size: tuple[int, int] | None,
    compiled: bool,
    attention: str,
    replicas: Any,
    num_gpus: float | None,
    num_cpus: float,
    labels: dict[str, str],
    timeout: float,
    others: dict[str, str],
    **options: Any,
) -> None:
    """Start a pool in a running Ray, and leave it running.

    With --config, the pool becomes what the file says: it is started, changed while it serves, or left as it is.
    """
    if file is not None:
        _refuse_beside_config(click.get_current_context())
        _up_as_declared(file, address, timeout, dry_run=dry_run)
        return
    if dry_run:
        raise click.UsageError("--dry-run goes with --config")
    if root is None:
        raise click.UsageError("name the model directory with --root, or declare the pool in a file: --config")
    config = DinoV3Config(root, dtype=dtype, image_size=image_size, compile=compiled, attention=attention)
    options = {key: value for key, value in options.items() if value is not None}
    options |= {key: parse_number(value) for key, value in others.items()}
    with _joined(address) as here, _progress(f"pool {name}") as report:
        pool = TeacherPool.start(
            config,
            name=name,
            namespace=namespace,
            replicas=replicas,
            num_gpus=num_gpus,
            num_cpus=num_cpus,
            label_selector=labels,
            timeout=timeout,
            on_status=report,
            **options,
        )
        started = pool.status()
    click.echo(f"pool {name!r} is up: {summary(started)}; teacher {started.fingerprint}")
    elsewhere = "" if namespace == NAMESPACE else f", namespace={namespace!r}"
    click.echo(f"use it with RemoteTeacher({name!r}, address={here!r}{elsewhere})")


def _refuse_beside_config(context: click.Context) -> None:
    for parameter in context.command.get_params(context):
        beside = parameter.name not in ("file", "dry_run", "address", "timeout")
        source = context.get_parameter_source(parameter.name or "")
        if beside and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} does not go with --config: say it in the file")


def _up_as_declared(file: Path, address: str | None, timeout: float, *, dry_run: bool) -> None:
    wanted = PoolFile.read(file)
    with _joined(address) as here:
        plan = plan_pool(wanted, here)
        for change in plan.changes or ():
            click.echo(f"  {change}")
        if plan.changes is None:
            click.echo(f"pool {wanted.name!r} does not run: it {'would be' if dry_run else 'is being'} started")
        elif not plan.changes:
            click.echo(f"pool {wanted.name!r} is as {file} says: nothing to change")
        if dry_run or plan.changes == ():
            return
        with _progress(f"pool {wanted.name}") as report:
            now = plan.carry_out(timeout, report)
        click.echo(f"pool {wanted.name!r} is as {file} says: {summary(now)}; teacher {now.fingerprint}")


@click.command()
@click.option("--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds, for --watch."
)
@click.option("--json", "as_json", is_flag=True, help="For scripts; with --watch one line each time.")
@_pool_options
@click.pass_context
def status(
    context: click.Context,
    name: str,
    address: str | None,
    namespace: str,
    watch: bool,
    interval: float,
    as_json: bool,
) -> None:
    """Show a pool: its replicas, their speed, their troubles.

    Images a second, and the share of the time that a replica computes, are of the last interval under --watch, and else
    since the replica started. golden is the cosine of its results to plain float32's, found before it took work.

    Exits with 0 if as many replicas as wanted are ready, with 3 if fewer are, with 1 if there is no such pool.
    """
    with _connected(name, address, namespace) as pool:
        if watch:
            _watch(pool, interval, as_json)
            return
        seen = pool.status()
    if as_json:
        click.echo(json.dumps(seen.as_dict(), indent=2))
    else:
        _console().print(render(seen, rates(None, seen)))
    context.exit(0 if is_healthy(seen) else _DEGRADED)


def _watch(pool: TeacherPool, interval: float, as_json: bool) -> None:
    console = _console()
    before: PoolStatus | None = None
    try:
        with Live(console=console, auto_refresh=False, transient=not console.is_terminal) as live:
            while True:
                seen = pool.status()
                if as_json:
                    click.echo(json.dumps(seen.as_dict()))
                elif console.is_terminal:
                    live.update(render(seen, rates(before, seen)), refresh=True)
                else:
                    console.print(render(seen, rates(before, seen)))
                before = seen
                time.sleep(interval)
    except KeyboardInterrupt:
        return  # how a person leaves it


@click.command()
@click.argument("replicas", callback=parse_replicas, metavar="N|MIN-MAX")
@click.option("--wait", is_flag=True, help="Until that many are ready and those to go have gone.")
@_timeout
@_pool_options
def scale(name: str, address: str | None, namespace: str, replicas: Any, wait: bool, timeout: float) -> None:
    """Change the number of replicas, or the range in which load may move it."""
    if replicas == "auto":
        raise click.BadParameter("write 4, or 2-8 for a range", param_hint="N|MIN-MAX")
    with _connected(name, address, namespace) as pool:
        pool.scale(replicas)
        if wait:
            with _progress(f"pool {name}") as report:
                pool.wait_ready(timeout, on_status=report)
        click.echo(f"pool {name!r}: {summary(pool.status())}")


@click.command()
@_teacher_options
@click.option("--wait/--no-wait", default=True, show_default=True, help="Until all replicas have the new teacher.")
@_timeout
@_pool_options
def reload(
    name: str,
    address: str | None,
    namespace: str,
    root: Path,
    dtype: ComputeDtype,
    image_size: tuple[int, int] | None,
    compiled: bool,
    attention: str,
    wait: bool,
    timeout: float,
) -> None:
    """Replace a pool's teacher, replica by replica, while it serves.

    The options describe the new teacher in full: none is taken over from the former one. If it fails to start three
    times in a row, the pool goes back to the former one, and this exits with 1.
    """
    config = DinoV3Config(root, dtype=dtype, image_size=image_size, compile=compiled, attention=attention)
    with _connected(name, address, namespace) as pool:
        former = pool.status().fingerprint
        if not wait:
            pool.reload(config, wait=False)
            click.echo(f"pool {name!r}: replacing teacher {former}")
            return
        with _progress(f"pool {name}") as report:
            pool.reload(config, timeout=timeout, on_status=report)
        now = pool.status()
    click.echo(f"pool {name!r}: teacher {former} -> {now.fingerprint}; {summary(now)}")


@click.command()
@_pool_options
def down(name: str, address: str | None, namespace: str) -> None:
    """End a pool, all of it. Does nothing where there is none."""
    with _joined(address):
        try:
            pool = TeacherPool.connect(name, namespace=namespace)
        except PoolNotFoundError as error:
            click.echo(_end_orphans(name, namespace) or f"nothing to end: {error}")
            return
        pool.shutdown()
    click.echo(f"pool {name!r} has ended")


def _end_orphans(name: str, namespace: str) -> str:
    """End replicas whose controller is gone, such as after a shutdown that was interrupted; "" if there are none."""
    orphans = end_replicas(namespace, name)
    Ledger(namespace, name).clear()
    return f"pool {name!r} had no controller; its replicas {', '.join(orphans)} have ended" if orphans else ""


@contextmanager
def _joined(address: str | None) -> Iterator[str]:
    """A connection to a running Ray, for the time of a command; gives its address.

    Raises:
        PoolError: none is named, or it cannot be reached.
    """
    if address is None and not os.environ.get("RAY_ADDRESS") and not ray.is_initialized():
        raise PoolError(
            "no Ray is named: pass --address HOST:PORT or set RAY_ADDRESS. To start one on this machine: "
            "`ray start --head --port 6379`, then --address 127.0.0.1:6379"
        )
    runtime = connect(address)
    try:
        yield runtime.address
    finally:
        runtime.close()


@contextmanager
def _connected(name: str, address: str | None, namespace: str) -> Iterator[TeacherPool]:
    """A connection to a running pool, for the time of a command."""
    with _joined(address), TeacherPool.connect(name, namespace=namespace) as pool:
        yield pool


@contextmanager
def _progress(what: str) -> Iterator[Callable[[PoolStatus], None]]:
    """Tells on standard error how a pool gets on: a line that changes, or lines where that is no terminal."""
    console = Console(stderr=True)
    shown = ""

    def report(seen: PoolStatus) -> None:
        nonlocal shown
        line = f"{what}: {summary(seen)}"
        if seen.troubles:
            line += f" (last trouble: {seen.troubles[-1]})"
        if line != shown:
            shown = line
            spinner.update(line)
            if not console.is_terminal:
                console.print(line, markup=False, highlight=False, soft_wrap=True)

    with console.status(what) as spinner:
        yield report


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)
