"""A command's connection to a running pool, and what it shows of it. Imports no torch, which would double the time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
import ray
from rich.console import Console
from rich.live import Live

from dinov3_ray.cli.table import rates, render, summary
from dinov3_ray.errors import PoolError
from dinov3_ray.pool.cluster import Runtime, check_name, connect
from dinov3_ray.pool.control.remote_control import RayControl, end_replicas
from dinov3_ray.pool.control.status import PoolStatus
from dinov3_ray.pool.kv import PoolKV

__all__ = ["connected", "end_orphans", "joined", "show_progress", "show_status", "watch_status"]

_WIDE = 160  # columns of a table that does not go to a terminal


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


@contextmanager
def connected(name: str, address: str | None, namespace: str) -> Iterator[RayControl]:
    """Connect to a running pool for the time of a command."""
    with joined(address) as here:
        yield RayControl.connect(check_name(name), namespace, Runtime(here, owned=False))


def show_status(seen: PoolStatus, *, as_json: bool) -> None:
    """Print a pool's status."""
    if as_json:
        click.echo(json.dumps(seen.as_dict(), indent=2))
    else:
        _console().print(render(seen, rates(None, seen)))


def watch_status(pool: RayControl, interval: float, as_json: bool) -> None:
    """Print a pool's status again and again, until Ctrl-C."""
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


def end_orphans(runtime: Runtime, name: str, namespace: str) -> str:
    """End replicas that have lost their controller, as after an interrupted shutdown; "" if there are none."""
    orphans = end_replicas(runtime, namespace, name)
    PoolKV(namespace, name).clear()
    return f"pool {name!r} had no controller; its replicas {', '.join(orphans)} have ended" if orphans else ""


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)
