"""The commands ``dinov3-ray status | scale | down``, and the options that all commands for pools share.

What they connect with is imported when they run, so that the help answers at once.
"""

from __future__ import annotations

from typing import Any

import click

from dinov3_ray.cli.values import Command, Replicas
from dinov3_ray.errors import PoolNotFoundError
from dinov3_ray.pool.address import NAMESPACE

__all__ = ["down", "pool_options", "scale", "status", "timeout_option"]

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


_DEGRADED = 3  # exit status: fewer replicas ready than wanted


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
    from dinov3_ray.cli.session import connected, show_status, watch_status
    from dinov3_ray.cli.table import is_healthy

    with connected(name, address, namespace) as pool:
        if watch:
            watch_status(pool, interval, as_json)
            return
        seen = pool.status()
    show_status(seen, as_json=as_json)
    context.exit(0 if is_healthy(seen) else _DEGRADED)


@click.command()
@click.argument("replicas", type=Replicas(auto=False))
@click.option("--wait", is_flag=True, help="Wait until as many are ready, and those that must go have ended.")
@timeout_option
@pool_options
def scale(name: str, address: str | None, namespace: str, replicas: Any, wait: bool, timeout: float) -> None:
    """Change the number of replicas, or the range in which the load may change it."""
    from dinov3_ray.cli.session import connected, show_progress
    from dinov3_ray.cli.table import summary
    from dinov3_ray.pool.control.remote_control import wait_ready
    from dinov3_ray.pool.spec import parse_replicas

    with connected(name, address, namespace) as pool:
        pool.scale(*parse_replicas(replicas, auto=1))
        if wait:
            with show_progress(f"pool {name}") as report:
                wait_ready(pool, name, timeout, on_status=report)
        click.echo(f"pool {name!r}: {summary(pool.status())}")


@click.command()
@pool_options
def down(name: str, address: str | None, namespace: str) -> None:
    """End a pool: its controller and all its replicas. Does nothing if there is no such pool."""
    from dinov3_ray.cli.session import end_orphans, joined
    from dinov3_ray.pool.cluster import Runtime, check_name
    from dinov3_ray.pool.control.remote_control import RayControl

    with joined(address) as here:
        try:
            pool = RayControl.connect(check_name(name), namespace, Runtime(here, owned=False))
        except PoolNotFoundError as error:
            click.echo(end_orphans(Runtime(here, owned=False), name, namespace) or f"nothing to end: {error}")
            return
        pool.shutdown()
    click.echo(f"pool {name!r} has ended")
