"""What the commands that deal with pools have in common: which pool, its Ray, and how it gets on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
import ray
from rich.console import Console

from dinov3_ray.errors import PoolError
from dinov3_ray.pool.cluster import NAMESPACE, connect
from dinov3_ray.pool.status import PoolStatus
from dinov3_ray.pool.table import summary

__all__ = ["Command", "joined", "pool_options", "progress", "timeout_option"]

Command = TypeVar("Command", bound=Callable[..., Any])

timeout_option = click.option(
    "--timeout", type=float, default=600.0, show_default=True, help="Seconds to wait at most."
)


def pool_options(command: Command) -> Command:
    """Which pool, and where."""
    for option in (
        click.option("--namespace", default=NAMESPACE, show_default=True, help="Ray namespace that the pool lives in."),
        click.option("--address", metavar="HOST:PORT", help="The Ray to join. [default: RAY_ADDRESS]"),
        click.option("--name", default="dinov3", show_default=True, help="The pool's name."),
    ):
        command = option(command)
    return command


@contextmanager
def joined(address: str | None) -> Iterator[str]:
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
def progress(what: str) -> Iterator[Callable[[PoolStatus], None]]:
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
