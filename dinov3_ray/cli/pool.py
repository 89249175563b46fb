"""The commands ``dinov3-ray status | scale | down``, and what all commands for pools share.

Nothing here imports torch, which would double the time of ``status``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
import ray
from rich.console import Console
from rich.live import Live

from dinov3_ray.cli.table import is_healthy, rates, render, summary
from dinov3_ray.cli.values import Command, Replicas
from dinov3_ray.errors import PoolError, PoolNotFoundError
from dinov3_ray.pool.cluster import NAMESPACE, Runtime, check_name, connect
from dinov3_ray.pool.control.remote_control import RayControl, end_replicas, wait_ready
from dinov3_ray.pool.control.status import PoolStatus
from dinov3_ray.pool.kv import PoolKV
from dinov3_ray.pool.spec import parse_replicas

__all__ = ["down", "joined", "pool_options", "scale", "show_progress", "status", "timeout_option"]


timeout_option = click.option(
    "--timeout", type=float, default=600.0, show_default=True, help="The longest time to wait, in seconds."
)


def pool_options(command: Command) -> Command:
    """The options that name a pool and its Ray."""
    for option in (
        click.option("--namespace", default=NAMESPACE, show_default=True, help="The pool's Ray namespace."),
        click.option("--address", metavar="HOST:PORT", help="The Ray to join. [default: RAY_ADDRESS]"),
        click.option("--name", default="dinov3", show_default=True, help="The pool's name."),
    ):
        command = option(command)
    return command


@contextmanager
def joined(address: str | None) -> Iterator[str]:
    """Connect to a running Ray for the time of a command; yields its address.

    Raises:
        PoolError: no Ray is named, or it cannot be reached.
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
def show_progress(what: str) -> Iterator[Callable[[PoolStatus], None]]:
    """Show a pool's status on standard error: one line that changes, or a new line each time without a terminal.

    Yields:
        The function to call with each new status.
    """
    console = Console(stderr=True)
    shown = ""

    def report(seen: PoolStatus) -> None:
        nonlocal shown
        line = f"{what}: {summary(seen)}"
        if seen.recent_errors:
            line += f" (last error: {seen.recent_errors[-1]})"
        if line != shown:
            shown = line
            spinner.update(line)
            if not console.is_terminal:
                console.print(line, markup=False, highlight=False, soft_wrap=True)

    with console.status(what) as spinner:
        yield report


_DEGRADED = 3  # exit status: fewer replicas ready than wanted
_WIDE = 160  # columns of a table that does not go to a terminal


@click.command()
@click.option("--watch", is_flag=True, help="Repeat until Ctrl-C.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    help="With --watch: seconds between two looks.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with --watch one line each time.")
@pool_options
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
    """Show a pool: its replicas, their speed, their errors.

    img/s is images per second, and busy is the share of the time that a replica computes. Both count since the replica
    started, or with --watch since the last look. golden is the cosine between a replica's results and those of plain
    float32, measured before it took work.

    The exit status is 0 if as many replicas as wanted are ready, 3 if fewer are ready, and 1 if there is no such pool.
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


def _watch(pool: RayControl, interval: float, as_json: bool) -> None:
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
        return  # the way to leave it


@click.command()
@click.argument("replicas", type=Replicas(auto=False))
@click.option("--wait", is_flag=True, help="Wait until as many are ready, and those that must go have ended.")
@timeout_option
@pool_options
def scale(name: str, address: str | None, namespace: str, replicas: Any, wait: bool, timeout: float) -> None:
    """Change the number of replicas, or the range in which the load may change it."""
    with _connected(name, address, namespace) as pool:
        pool.scale(*parse_replicas(replicas, auto=1))
        if wait:
            with show_progress(f"pool {name}") as report:
                wait_ready(pool, name, timeout, on_status=report)
        click.echo(f"pool {name!r}: {summary(pool.status())}")


@click.command()
@pool_options
def down(name: str, address: str | None, namespace: str) -> None:
    """End a pool: its controller and all its replicas. Does nothing if there is no such pool."""
    with joined(address) as here:
        try:
            pool = RayControl.connect(check_name(name), namespace, Runtime(here, owned=False))
        except PoolNotFoundError as error:
            click.echo(_end_orphans(Runtime(here, owned=False), name, namespace) or f"nothing to end: {error}")
            return
        pool.shutdown()
    click.echo(f"pool {name!r} has ended")


def _end_orphans(runtime: Runtime, name: str, namespace: str) -> str:
    """End replicas that have lost their controller, as after an interrupted shutdown; "" if there are none."""
    orphans = end_replicas(runtime, namespace, name)
    PoolKV(namespace, name).clear()
    return f"pool {name!r} had no controller; its replicas {', '.join(orphans)} have ended" if orphans else ""


@contextmanager
def _connected(name: str, address: str | None, namespace: str) -> Iterator[RayControl]:
    """Connect to a running pool for the time of a command."""
    with joined(address) as here:
        yield RayControl.connect(check_name(name), namespace, Runtime(here, owned=False))


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)
